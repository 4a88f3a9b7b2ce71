"""Every setting of the server: one frozen model, checked once at start, never changed afterwards.

Owns names, defaults, ranges and descriptions (docs/settings.md is generated from them), and the order in which sources
win: flag > `PROMPTMUX_*` environment variable > TOML file > default. A key that no setting has is fatal in every
source, so that a misspelt setting never passes for a working one. Refuses to know what the settings are used for.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from server.embedded import default_cache_dir

ENV_PREFIX = "PROMPTMUX_"
# Variables with our prefix that other parts of the project read; they are no settings of the server.
OTHER_ENV_NAMES = frozenset(
    {"PROMPTMUX_CACHE", "PROMPTMUX_CONFIG", "PROMPTMUX_URL", "PROMPTMUX_KEY", "PROMPTMUX_FAILPOINT"}
)
# Kubernetes gives every pod PROMPTMUX_SERVICE_HOST, PROMPTMUX_PORT=tcp://… and more when a service has our name.
_SERVICE_LINK = re.compile(r"^PROMPTMUX_(.*_)?(SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_(TCP|UDP).*)$")

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_BYTE_SIZE = TypeAdapter(ByteSize)


def _parse_size(value: object) -> object:
    """Lets sizes be written as people write them: 1073741824, "1GiB", "500 MB"."""
    return int(_BYTE_SIZE.validate_python(value)) if isinstance(value, str) else value


def _expand_user(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str | Path) else value


Bytes = Annotated[int, BeforeValidator(_parse_size)]
Folder = Annotated[Path, BeforeValidator(_expand_user)]

# The order and the headings of `promptmux serve --help` and docs/settings.md; a test holds that nothing is missing.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Model": ("model", "dtype", "quantization", "device", "num_threads", "compile", "max_model_len"),
    "Network": (
        "host",
        "port",
        "drain_timeout_s",
        "failure_grace_s",
        "slow_reader_timeout_s",
        "ping_interval_s",
        "upload_timeout_s",
    ),
    "Folders": ("data_dir", "cache_dir", "demo_dir"),
    "Batch": ("max_rows", "max_step_tokens", "prefill_chunk", "max_waiting_rows", "deterministic"),
    "Memory": ("kv_cache_bytes", "prefix_cache_bytes", "host_prompt_bytes", "text_cache"),
    "Limits": ("max_virtual_tokens", "max_body_bytes", "max_upload_bytes", "max_request_tokens", "max_prompts"),
    "Isolation": ("audit_share",),
    "Logs": ("log_format", "log_level"),
}


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/promptmux`, else `~/.local/share/promptmux`; an empty variable counts as unset."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "promptmux"


class SettingsError(Exception):
    """A setting is unknown or has a value out of range.

    `key` is the setting's name as its source wrote it (None when two settings disagree, or a file cannot be read) and
    `origin` the source: a flag, an environment variable, or a file.
    """

    def __init__(self, message: str, *, key: str | None = None, origin: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.origin = origin


OnOff = Literal["on", "off"]


class Settings(BaseModel):
    """All settings. Sizes are in bytes (text such as "64MiB" is understood), times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    model: str | None = Field(
        None,
        min_length=1,
        description="The frozen backbone: a folder, a hub id or a GGUF file. None: the embedded SmolLM2-135M-Instruct.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of weights, keys and values. auto: bfloat16 where the device has it, else float32.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: weights of linear layers in 8 bits, at a small loss. On the CPU alone.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="Where the backbone runs: auto, cpu, cuda or cuda:N. auto: the first GPU, else the CPU.",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the engine. None: OMP_NUM_THREADS, else one a physical core within the CPU limit.",
    )
    compile: Literal["auto", "off"] = Field(
        "auto",
        description="auto: steps are compiled in the background and used where they are faster. On the CPU alone.",
    )
    max_model_len: int | None = Field(
        None,
        ge=8,
        le=16 * MIB,
        description="Longest sequence in tokens: virtual, prompt and new ones. None: what the backbone allows.",
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Anything but a loopback address is refused while the store has no API key.",
    )
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        description="Port to listen on; 0 takes a free one and prints it.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=86400,
        description="How long running requests may go on after SIGTERM before they end with an error.",
    )
    failure_grace_s: float = Field(
        5.0,
        ge=0,
        le=86400,
        description="How long a server whose engine has failed answers /livez with 503 before it exits with code 1.",
    )
    slow_reader_timeout_s: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="A client that reads nothing of its stream for so long has its rows cancelled.",
    )
    ping_interval_s: float = Field(
        15.0,
        gt=0,
        le=86400,
        description="A silent stream gets a comment line this often, so that proxies keep it open.",
    )
    upload_timeout_s: float = Field(
        120.0,
        gt=0,
        le=86400,
        description="How long the body of a prompt upload may take to arrive.",
    )
    data_dir: Folder = Field(
        default_factory=default_data_dir,
        description="The store of prompts, tasks and keys. Back it up. Only one server uses it at a time.",
    )
    cache_dir: Folder = Field(
        default_factory=default_cache_dir,
        description="What can be made again: the converted backbone, fingerprints, compiled code. Safe to delete.",
    )
    demo_dir: Folder | None = Field(
        None,
        description="Folder of demo prompts, put into the tenant `shared` at start where they are absent.",
    )
    max_rows: int = Field(
        64,
        ge=1,
        le=4096,
        description="Sequences that run in one batch.",
    )
    max_step_tokens: int = Field(
        512,
        ge=1,
        le=MIB,
        description="Tokens in one forward pass, prompts being read and rows being generated together.",
    )
    prefill_chunk: int = Field(
        256,
        ge=1,
        le=MIB,
        description="Tokens of one prompt that are read in one step; a longer prompt takes several.",
    )
    max_waiting_rows: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Sequences that may wait for a place in the batch; more are refused with 503.",
    )
    deterministic: OnOff = Field(
        "off",
        description="on: a sequence's bits do not depend on what shares the batch. Costs speed and memory.",
    )
    kv_cache_bytes: Bytes | None = Field(
        None,
        ge=4 * KIB,
        description="Memory for keys and values of rows. None: a quarter of all memory, on CUDA 0.6 of what is free.",
    )
    prefix_cache_bytes: Bytes = Field(
        GIB,
        ge=4 * KIB,
        description="Memory on the device for prefixes (compiled prompts), at least two of the longest.",
    )
    host_prompt_bytes: Bytes = Field(
        256 * MIB,
        ge=4 * KIB,
        description="Host memory for prompts as they were read from the store.",
    )
    text_cache: OnOff = Field(
        "on",
        description="on: keys and values of text are kept for later requests of the same tenant and prompt that begin "
        "with it.",
    )
    max_virtual_tokens: int = Field(
        512,
        ge=1,
        le=65536,
        description="Virtual tokens that an uploaded prompt may have.",
    )
    max_body_bytes: Bytes = Field(
        4 * MIB,
        ge=KIB,
        description="Largest body of a request that is not an upload; counted while it streams in.",
    )
    max_upload_bytes: Bytes = Field(
        64 * MIB,
        ge=KIB,
        description="Largest body of a prompt upload; counted while it streams in.",
    )
    max_request_tokens: int = Field(
        131_072,
        ge=1,
        description="New tokens that one request may ask for: items × n × max_tokens.",
    )
    max_prompts: int = Field(
        256,
        ge=1,
        le=65536,
        description="Items that `prompt` of one request may have.",
    )
    audit_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of finished rows that are replayed alone and compared (the isolation audit).",
    )
    log_format: Literal["auto", "json", "human"] = Field(
        "auto",
        description="json: one object a line. human: for eyes. auto: human on a terminal, else json.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe level that is written.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        # No setting is a boolean, and Python would take `max_rows = true` for 1.
        if isinstance(value, bool):
            raise ValueError("a boolean is not a value of this setting")
        return value

    @model_validator(mode="after")
    def _check_budgets(self) -> Self:
        if self.max_step_tokens < self.max_rows:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_rows ({self.max_rows}): "
                "every running row needs one token a step"
            )
        if self.prefill_chunk > self.max_step_tokens:
            raise ValueError(
                f"prefill_chunk ({self.prefill_chunk}) must be at most max_step_tokens ({self.max_step_tokens})"
            )
        return self


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings in force, and for each name the source that gave its value (a flag, a variable, a file, "default")."""

    settings: Settings
    origins: Mapping[str, str]


def flag_name(name: str) -> str:
    """The command-line flag of a setting: `max_rows` → `--max-rows`."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """The environment variable of a setting: `max_rows` → `PROMPTMUX_MAX_ROWS`."""
    return ENV_PREFIX + name.upper()


def load_settings(
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Settings in force; see `resolve_settings`."""
    return resolve_settings(flags, config_file, env).settings


def resolve_settings(
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> ResolvedSettings:
    """Merges flags, environment and file, and checks the result.

    `flags` is keyed by setting name; a value of None means that the flag was not given. An empty environment variable
    counts as not set. `env` None reads the process' environment. Raises `SettingsError`.
    """
    environment = os.environ if env is None else env
    merged: dict[str, object] = {}
    origins: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    layers = (
        _read_file(config_file) if config_file is not None else {},
        _read_environment(environment),
        {name: (value, f"flag {flag_name(name)}") for name, value in (flags or {}).items() if value is not None},
    )
    for layer in layers:
        for name, (value, origin) in layer.items():
            _check_known(name, origin)
            merged[name] = value
            origins[name] = origin
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        raise _to_settings_error(error, origins) from None
    return ResolvedSettings(settings, origins)


def _read_file(path: Path) -> dict[str, tuple[object, str]]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read the configuration file {path}: {error.strerror}", origin=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the configuration file {path} is not valid TOML: {error}", origin=str(path)) from None
    return {name: (value, f"file {path}") for name, value in content.items()}


def _read_environment(environment: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_ENV_NAMES:
            continue
        if _SERVICE_LINK.match(variable) or (variable == "PROMPTMUX_PORT" and "://" in value):
            raise SettingsError(
                f"{variable} comes from a Kubernetes service named promptmux, not from you: "
                "set enableServiceLinks: false in the pod's spec, or name the service otherwise",
                key=variable,
                origin="environment",
            )
        name = variable.removeprefix(ENV_PREFIX).lower()
        if env_name(name) != variable or name not in Settings.model_fields:
            raise _unknown(variable, "environment", [env_name(known) for known in Settings.model_fields])
        if value != "":
            found[name] = (value, f"environment {variable}")
    return found


def _check_known(name: str, origin: str) -> None:
    if name not in Settings.model_fields:
        raise _unknown(name, origin, list(Settings.model_fields))


def _unknown(key: str, origin: str, known: list[str]) -> SettingsError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `promptmux config` lists them all"
    return SettingsError(f"unknown setting {key} ({origin}){hint}", key=key, origin=origin)


def _to_settings_error(error: ValidationError, origins: Mapping[str, str]) -> SettingsError:
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return SettingsError(reason)
    name = str(first["loc"][0])
    return SettingsError(f"{name} ({origins[name]}): {reason}", key=name, origin=origins[name])
