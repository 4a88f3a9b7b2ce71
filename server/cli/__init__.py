"""The `promptmux` command: what it is made of, and `main`.

Whatever is slow to import (torch, the store, the app) is imported by the command that needs it, so that
`promptmux --help` answers at once.
"""

import sys

import typer

from server.cli import keys, local, quota, rollout, tasks
from server.cli.audit import audit
from server.cli.bench import bench
from server.cli.check import check
from server.cli.doctor import doctor
from server.cli.inspect import compare, inspect
from server.cli.migrate import migrate
from server.cli.output import EXIT_CODE_HELP, ExitCode
from server.cli.push import push
from server.cli.reload import reload
from server.cli.serve import serve
from server.cli.train import train

SERVER, PROMPTS, TENANTS, TROUBLE = "Server", "Prompts", "Tenants", "Is all well?"

app = typer.Typer(
    name=local.PROGRAM,
    help="Many soft prompts over one frozen language model, served over HTTP.",
    epilog=EXIT_CODE_HELP,
    no_args_is_help=True,
    # Tracebacks with local variables would print keys and prompts.
    pretty_exceptions_show_locals=False,
)

_COMMANDS = {
    SERVER: (serve, local.config, reload, migrate, local.backbone, local.version, local.completion),
    PROMPTS: (
        *(train, push, tasks.ls, tasks.show, tasks.pull, tasks.rm),
        *(rollout.activate, rollout.rollback, rollout.canary, rollout.pin, rollout.unpin, inspect, compare),
    ),
    TENANTS: (audit,),
    TROUBLE: (check, doctor, bench),
}
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(keys.app, name="keys", rich_help_panel=TENANTS)
app.add_typer(quota.app, name="quota", rich_help_panel=TENANTS)


def main() -> None:
    """The console script. Ctrl-C ends any command without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (`promptmux ls | head`) has seen enough.
        sys.exit(ExitCode.FAILED)
