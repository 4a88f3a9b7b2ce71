"""The `promptmux` command: `main` and the commands that need neither a server nor a model.

Owns what the command line is made of. Whatever is slow to import (torch, the store, the app) is imported by the command
that needs it, so that `promptmux --help` answers at once.
"""

import importlib.metadata
import json
import platform
import sys
from typing import Annotated, Any

import typer

from server import __version__
from server.cli import keys, tasks
from server.cli.bench import bench
from server.cli.output import EXIT_CODE_HELP, ExitCode, print_json, print_table
from server.cli.serve import make_embedded_backbone, serve
from server.cli.setting_flags import ConfigFile, resolve_or_fail, with_setting_flags

app = typer.Typer(
    name="promptmux",
    help="Many soft prompts over one frozen language model, served over HTTP.",
    epilog=EXIT_CODE_HELP,
    no_args_is_help=True,
    add_completion=False,
    # Tracebacks with local variables would print keys and prompts.
    pretty_exceptions_show_locals=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_REPORTED_PACKAGES = ("torch", "transformers", "safetensors", "fastapi")


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
    found = {"promptmux": __version__, "python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
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


app.command()(serve)
app.command()(config)
app.command()(version)
app.command()(backbone)
app.command()(tasks.push)
app.command()(tasks.ls)
app.command()(tasks.show)
app.command()(tasks.rollback)
app.command()(tasks.rm)
app.command()(tasks.pull)
app.command()(bench)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The console script. Ctrl-C ends any command without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (`promptmux ls | head`) has seen enough.
        sys.exit(ExitCode.FAILED)
