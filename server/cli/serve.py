"""`promptmux serve`: settings in, a listening server out, and a clean end on a signal.

Owns the socket, the rule that nothing but loopback is bound without keys, and the order in which a process is put
together. Refuses to know how the app is built (`server.app`) and how it ends (`server.cli.draining`).
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from server.cli.output import ExitCode, fail, to_stderr
from server.cli.setting_flags import ConfigFile, resolve_or_fail, with_setting_flags
from server.loopback import is_loopback
from server.settings import Settings
from server.settings_sources import load_settings


@with_setting_flags
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The frozen backbone: a folder, a hub id or a GGUF file. None: the embedded SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Serve a backbone and its prompts over HTTP.

    A setting is a flag, a variable (PROMPTMUX_MAX_ROWS) or a key of the file (max_rows); the first given wins.

    SIGTERM or Ctrl-C: new requests get 503, running ones finish, then it exits. A second signal exits at once.
    An engine that fails ends the process with code 1.
    """
    given = {"model": model, **flags}
    settings = resolve_or_fail(given, config).settings
    if not is_loopback(settings.host):
        _require_keys(settings)
    listener = bind(settings.host, settings.port)
    if settings.metrics_port is not None:
        # The app listens there; what would keep it from that is better known before anything slow has begun.
        bind(settings.host, settings.metrics_port, flag="--metrics-port").close()
    _serve(settings, listener, lambda: load_settings(given, config))


def bind(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A socket bound to the address; a port in use ends the command before anything slow has begun."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        fail(f"cannot listen on {host}: {error.strerror}", code=ExitCode.USAGE, hint="--host 127.0.0.1")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        fail(f"cannot listen on {host} port {port}: {error.strerror}", hint=f"{flag} 0 takes a free one")
    return listener


def _require_keys(settings: Settings) -> None:
    from prompt_store.errors import PromptStoreError
    from prompt_store.location import show_location
    from prompt_store.store import PromptStore

    where = show_location(settings.store_location)
    try:
        with PromptStore.open(settings.store_location, exclusive=False) as store:
            has_keys = store.has_keys()
    except (PromptStoreError, OSError) as error:
        shared_hint = "psql URL, which says more about what is wrong"
        fail(str(error), hint="--data-dir DIR, a folder you may write to" if settings.store is None else shared_hint)
    if not has_keys:
        fail(
            f"{settings.host} can be reached from other machines, and the store in {where} has no API key",
            code=ExitCode.DENIED,
            hint=f"promptmux keys create --scope infer --data {where}",
        )


def _serve(settings: Settings, listener: socket.socket, read_settings: Callable[[], Settings]) -> NoReturn:
    from server.logs import configure_logging

    configure_logging(settings.log_format, settings.log_level)
    # Its default would end the process while there is nothing yet that could read settings anew.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.stderr.isatty():
        if settings.model is None:
            # Elsewhere it is made while the server already listens; here someone wants to see how far it is.
            make_embedded_backbone(settings.cache_dir)
        # What is imported takes seconds in which nothing else is to be seen.
        with to_stderr().status("starting"):
            from server.app import create_app
    else:
        # Libraries draw their progress bars with tqdm; in a log file they are noise.
        os.environ.setdefault("TQDM_DISABLE", "1")
        from server.app import create_app
    from server.cli.draining import DrainingServer

    DrainingServer(create_app(settings, read_settings=read_settings), settings).serve_on(listener)


def make_embedded_backbone(cache_dir: Path) -> Path:
    """The folder of the embedded backbone, converted if needed, with progress on a terminal."""
    from server.embedded import EmbeddedBackboneError, ensure_embedded_backbone

    try:
        return ensure_embedded_backbone(cache_dir, progress=sys.stderr.isatty())
    except EmbeddedBackboneError as error:
        fail(str(error))
