"""Gives a command one flag for each setting, generated from `Settings`, so that the two cannot drift apart."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from server.cli.output import ExitCode, fail
from server.settings import GROUPS, Settings, flag_name
from server.settings_sources import ResolvedSettings, SettingsError, resolve_settings

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", envvar="PROMPTMUX_CONFIG", show_envvar=True, help="Settings as TOML."),
]


def with_setting_flags(command: Callable[..., None], *, groups: Iterable[str] = tuple(GROUPS)) -> Callable[..., None]:
    """Adds the flags to a command that takes `**flags`; it gets their text, or None for a flag that was not given.

    `groups` are the headings of `GROUPS` whose settings the command has a use for.
    `model` is left out: it is the command's own argument. Values stay text here and are checked with all other
    sources by `resolve_settings`, so that every source gives the same errors.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for group in groups:
        for name in GROUPS[group]:
            if name == "model":
                continue
            field = Settings.model_fields[name]
            kind = bool if is_switch(name) else str
            option = typer.Option(
                flag_text(name),
                help=field.description,
                metavar=None if kind is bool else metavar(field),
                show_default=default_text(name),
                rich_help_panel=group,
            )
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
                )
            )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def resolve_or_fail(flags: Mapping[str, object], config: Path | None) -> ResolvedSettings:
    """`resolve_settings`, with a wrong setting ending the command."""
    given = {name: ("off", "on")[value] if isinstance(value, bool) else value for name, value in flags.items()}
    try:
        return resolve_settings(given, config)
    except SettingsError as error:
        fail(str(error), code=ExitCode.USAGE, hint="`promptmux serve --help` lists the settings with their defaults")


def is_switch(name: str) -> bool:
    """Whether a setting is on or off and nothing else: on the command line it is a flag without a value."""
    return set(metavar(Settings.model_fields[name]).split("|")) == {"on", "off"}


def flag_text(name: str) -> str:
    """`--max-rows`; `--text-cache/--no-text-cache` for a switch."""
    flag = flag_name(name)
    return f"{flag}/--no-{flag.removeprefix('--')}" if is_switch(name) else flag


def metavar(field: FieldInfo) -> str:
    """What to write after a flag: the choices, or the kind of value."""
    kinds = [kind for kind in _union_members(field.annotation) if kind is not types.NoneType]
    if typing.get_origin(kinds[0]) is Literal:
        return "|".join(typing.get_args(kinds[0]))
    if any("_parse_size" in repr(item) for item in (*field.metadata, *_metadata(kinds[0]))):
        return "BYTES"
    plain = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is Annotated else kinds[0]
    return {int: "INTEGER", float: "NUMBER", Path: "DIR"}.get(plain, "TEXT")


def default_text(name: str) -> str:
    """A setting's default as people write it; the same on every machine."""
    if name == "data_dir":
        return "~/.local/share/promptmux"
    if name == "cache_dir":
        return "~/.cache/promptmux"
    field = Settings.model_fields[name]
    if field.default is None:
        return "none"
    if metavar(field) == "BYTES":
        return _size_text(field.default)
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _size_text(num_bytes: int) -> str:
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (types.UnionType, typing.Union)
        else (annotation,)
    )


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())
