"""Every setting of the server: one frozen model, checked once at start, never changed afterwards.

Owns names, defaults, ranges and descriptions (docs/settings.md is generated from them). Refuses to know where values
come from (`server.settings_sources`) and what they are used for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from server.embedded import default_cache_dir
from server.setting_types import GIB, KIB, MIB, Bytes, Folder, OnOff
from server.store_url import StoreUrl
from server.training_settings import TrainingSettings

ENV_PREFIX = "PROMPTMUX_"

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
        "body_timeout_s",
        "upload_timeout_s",
        "metrics_port",
        "metrics_key_required",
    ),
    "Folders": ("data_dir", "cache_dir", "demo_dir"),
    "Shared store": ("store", "store_max_stale_s"),
    "Batch": ("max_rows", "max_step_tokens", "prefill_chunk", "max_waiting_rows", "overlap", "deterministic"),
    "Memory": ("kv_cache_bytes", "prefix_cache_bytes", "host_prompt_bytes", "text_cache"),
    "Limits": ("max_virtual_tokens", "max_body_bytes", "max_upload_bytes", "max_request_tokens", "max_prompts"),
    "Tenants": (
        "default_requests_per_minute",
        "default_tokens_per_minute",
        "default_max_running_rows",
        "default_max_prompts",
        "default_max_prompt_bytes",
        "default_max_virtual_tokens",
    ),
    "Training": (
        "allow_training",
        "training_share",
        "training_jobs_at_once",
        "max_training_steps",
        "max_training_tokens",
        "max_training_parameters",
        "max_training_file_bytes",
        "max_tenant_training_bytes",
        "max_tenant_training_jobs",
    ),
    "Isolation": ("audit_share",),
    "Logs": ("log_format", "log_level", "receipts_max_rows"),
}

# May change while the server runs; the rest needs a restart.
RELOADABLE = frozenset({"log_level", *GROUPS["Tenants"]})


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/promptmux`, else `~/.local/share/promptmux`; an empty variable counts as unset."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "promptmux"


class Settings(TrainingSettings):
    """All settings. Sizes are in bytes (text such as "64MiB" is understood), times in seconds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )

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
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="How long the body of a request that is not an upload may take to arrive; then it gets 408.",
    )
    upload_timeout_s: float = Field(
        120.0,
        gt=0,
        le=86400,
        description="How long the body of an upload may take to arrive; then it gets 408.",
    )
    data_dir: Folder = Field(
        default_factory=default_data_dir,
        description="The store of prompts, tasks and keys. Back it up. Only one server uses it at a time.",
    )
    store: StoreUrl | None = Field(
        None,
        description="postgresql://USER:PASSWORD@HOST/DATABASE: a store that many servers share, instead of the one in "
        "data_dir.",
    )
    store_max_stale_s: float = Field(
        300.0,
        ge=0,
        le=86400,
        description="How long a server whose shared store is away answers from what it remembers of it.",
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
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: a step is launched before the one before it is looked at. auto: on CUDA, not on the CPU.",
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
    default_requests_per_minute: int | None = Field(
        None,
        ge=0,
        description="Requests a minute of a tenant that has no limit of its own. None: no limit.",
    )
    default_tokens_per_minute: int | None = Field(
        None,
        ge=0,
        description="Tokens a minute, read and made, of a tenant that has no limit of its own. None: no limit.",
    )
    default_max_running_rows: int | None = Field(
        None,
        ge=0,
        description="Sequences that may run or wait at once of a tenant that has no limit of its own. None: no limit.",
    )
    default_max_prompts: int | None = Field(
        None,
        ge=0,
        description="Prompt versions of a tenant that has no limit of its own. None: no limit.",
    )
    default_max_prompt_bytes: Bytes | None = Field(
        None,
        ge=0,
        description="Bytes of prompts of a tenant that has no limit of its own. None: no limit.",
    )
    default_max_virtual_tokens: int | None = Field(
        None,
        ge=0,
        description="Virtual tokens of all prompts together of a tenant that has no limit of its own. None: no limit.",
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of its own for /metrics, where no key is asked for; on the server's port it then needs one.",
    )
    metrics_key_required: OnOff = Field(
        "off",
        description="on: /metrics needs an API key, with the scope `infer`.",
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
    receipts_max_rows: int = Field(
        1_000_000,
        ge=0,
        le=1_000_000_000,
        description="How many receipts (which prompt answered which request) are kept, the newest; 0 writes none.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        # No setting is a boolean, and Python would take `max_rows = true` for 1.
        if isinstance(value, bool):
            raise ValueError("a boolean is not a value of this setting")
        return value

    @property
    def store_location(self) -> str | Path:
        """Where the store is: the URL of a shared one, or the folder."""
        return self.data_dir if self.store is None else self.store.get_secret_value()

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


def flag_name(name: str) -> str:
    """The command-line flag of a setting: `max_rows` → `--max-rows`."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """The environment variable of a setting: `max_rows` → `PROMPTMUX_MAX_ROWS`."""
    return ENV_PREFIX + name.upper()
