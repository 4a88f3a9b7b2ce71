"""Which server a command talks to, and with which key: the options that all of them share.

Owns `--url`, `--key`, their environment variables, and the client's own file, from which both are taken when neither
flag nor variable gives them. Owns too the completion of task names, which asks that server. Refuses to know what is
asked of it.

The file is TOML with the keys `url` and `key`: `$PROMPTMUX_CLIENT_CONFIG`, else
`$XDG_CONFIG_HOME/promptmux/client.toml`, else `~/.config/promptmux/client.toml`. A key that it does not know is fatal,
as in the server's settings.
"""

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import httpx
import typer

from server.cli.http_client import DEFAULT_URL, ServerClient
from server.cli.output import ExitCode, fail, say

CLIENT_KEYS = ("url", "key")
_COMPLETION_TIMEOUT_S = 1.0
_MAX_COMPLETIONS = 1000
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="PROMPTMUX_URL", show_envvar=True, show_default=DEFAULT_URL, help="Address of the server."
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="PROMPTMUX_KEY", show_envvar=True, help="API key, where the server asks for one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(url: str | None, key: str | None) -> ServerClient:
    """A client for the server that flag, variable or file names. A file that cannot be used ends the command."""
    return ServerClient(*resolve_connection(url, key))


def resolve_connection(url: str | None, key: str | None) -> tuple[str, str | None]:
    """Address and key in force: what was given, else the client's file, else the default address and no key.

    The file's key goes to the file's own server alone: given another address, it is not sent along.
    """
    filed = _read_client_file()
    if url is None:
        url = filed.get("url", DEFAULT_URL)
    if key is None and url.rstrip("/") == filed.get("url", DEFAULT_URL).rstrip("/"):
        key = filed.get("key")
    return url, key or None


def client_file(env: Mapping[str, str] | None = None) -> Path:
    """Where the client's file is looked for; empty variables count as unset."""
    env = os.environ if env is None else env
    if own := env.get("PROMPTMUX_CLIENT_CONFIG"):
        return Path(own).expanduser()
    return Path(env.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "promptmux/client.toml"


def complete_task(context: typer.Context, incomplete: str) -> list[str]:
    """Task names of the server that begin with what was typed; none where it does not answer at once."""
    try:
        url, key = resolve_connection(context.params.get("url"), context.params.get("key"))
        response = httpx.get(
            f"{url.rstrip('/')}/v1/tasks",
            params={"limit": _MAX_COMPLETIONS},
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_COMPLETION_TIMEOUT_S,
        )
        names = [str(item["task"]) for item in response.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, typer.Exit):
        return []
    return [name for name in names if name.startswith(incomplete)]


TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", autocompletion=complete_task)]


def parse_reference(reference: str) -> tuple[str, int | None]:
    """`task` or `task@version`. Anything else behind the @ ends the command."""
    task, at, text = reference.partition("@")
    if not at:
        return task, None
    version = parse_version(text)
    if version is None:
        fail(f"{text[:80]!r} is not a version number", code=ExitCode.USAGE, hint=f"{task}@1")
    return task, version


def parse_version(text: str) -> int | None:
    """A version's number, None for a text that cannot be one."""
    return int(text) if _VERSION.fullmatch(text) else None


def _read_client_file() -> dict[str, str]:
    path = client_file()
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
            mode = os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        if os.environ.get("PROMPTMUX_CLIENT_CONFIG"):
            fail(f"{path} does not exist", code=ExitCode.USAGE, hint="unset PROMPTMUX_CLIENT_CONFIG, or write the file")
        return {}
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", code=ExitCode.USAGE)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is not valid TOML: {error}", code=ExitCode.USAGE, hint=f'url = "{DEFAULT_URL}"')
    for name, value in content.items():
        if name not in CLIENT_KEYS:
            close = difflib.get_close_matches(name, CLIENT_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it may have {' and '.join(CLIENT_KEYS)}"
            fail(f"unknown key {name} in {path}", code=ExitCode.USAGE, hint=hint)
        if not isinstance(value, str):
            fail(f"{name} in {path} is not a text", code=ExitCode.USAGE, hint=f'{name} = "…"')
    if "key" in content and mode & (stat.S_IRWXG | stat.S_IRWXO):
        say(f"warning: others on this machine may read the key in {path}; chmod 600 {path}")
    return content
