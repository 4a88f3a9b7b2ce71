"""The commands that need neither a server nor a model: config, version, backbone and completion."""

import importlib.metadata
import json
import platform
from typing import Annotated, Any, Literal

import typer

from server import __version__
from server.cli.connection import Json
from server.cli.output import print_json, print_table
from server.cli.serve import make_embedded_backbone
from server.cli.setting_flags import ConfigFile, resolve_or_fail, with_setting_flags

PROGRAM = "promptmux"
REPORTED_PACKAGES = ("torch", "transformers", "safetensors", "fastapi")


@with_setting_flags
def config(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for serve.")] = None,
    config: ConfigFile = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Print the settings in force and where each comes from, without starting anything."""
    resolved = resolve_or_fail({"model": model, **flags}, config)
    values = json.loads(resolved.settings.model_dump_json())
    if as_json:
        print_json({name: {"value": value, "origin": resolved.origins[name]} for name, value in values.items()})
        return
    print_table(("setting", "value", "from"), [(name, value, resolved.origins[name]) for name, value in values.items()])


def version(as_json: Json = False) -> None:
    """Print versions of promptmux and what it stands on."""
    found = {PROGRAM: __version__, "python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        print_json(found)
        return
    for name, number in found.items():
        typer.echo(f"{name} {number}")


def backbone(config: ConfigFile = None) -> None:
    """Print the folder of the embedded default backbone, making it first if needed (once, some seconds)."""
    typer.echo(make_embedded_backbone(resolve_or_fail({}, config).settings.cache_dir))


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish", "powershell"], typer.Argument(help="Which shell it is for.")],
) -> None:
    """Print the script that completes commands, options and task names: `eval "$(promptmux completion bash)"`."""
    from typer._completion_shared import get_completion_script

    typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=f"_{PROGRAM.upper()}_COMPLETE", shell=shell))
