"""Where settings come from: flag > `PROMPTMUX_*` environment variable > TOML file > default.

Owns the order in which sources win and the memory of which one won. A key that no setting has is fatal in every source,
so that a misspelt setting never passes for a working one. Refuses to know what the settings are (`server.settings`).
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from server.settings import ENV_PREFIX, Settings, env_name, flag_name

# Variables with our prefix that other parts of the project read; they are no settings of the server.
OTHER_ENV_NAMES = frozenset(
    {
        "PROMPTMUX_CACHE",
        "PROMPTMUX_CLIENT_CONFIG",
        "PROMPTMUX_CONFIG",
        "PROMPTMUX_FAILPOINT",
        "PROMPTMUX_KEY",
        "PROMPTMUX_URL",
    }
)
# Kubernetes gives every pod PROMPTMUX_SERVICE_HOST, PROMPTMUX_PORT=tcp://… and more when a service has our name.
_SERVICE_LINK = re.compile(r"^PROMPTMUX_(.*_)?(SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_(TCP|UDP).*)$")


class SettingsError(Exception):
    """A setting is unknown or has a value out of range.

    `key` is the setting's name as its source wrote it (None when two settings disagree, or a file cannot be read) and
    `origin` the source: a flag, an environment variable, or a file.
    """

    def __init__(self, message: str, *, key: str | None = None, origin: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.origin = origin


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings in force, and for each name the source that gave its value (a flag, a variable, a file, "default")."""

    settings: Settings
    origins: Mapping[str, str]


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
