"""The folders and the port: room, the speed of the disk, the store's state, and whether anyone listens already."""

import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from server.doctor import shared_store
from server.doctor.findings import Finding, size_text
from server.loopback import is_loopback
from server.setting_types import GIB
from server.settings import Settings

if TYPE_CHECKING:
    import sqlalchemy

_MIN_FREE_BYTES = GIB
_NUM_SYNCS = 5
SLOW_SYNC_S = 0.05


def check_data_folder(settings: Settings) -> Iterator[Finding]:
    """Room, and how long it takes until a write is on the disk: each upload waits for several such."""
    folder = _nearest(settings.data_dir)
    try:
        sync_s = measure_sync(folder)
    except OSError as error:
        # Tried, not asked: a superuser may write to a read-only disk as far as permissions tell.
        advice = "--data-dir DIR, a folder that this user may write to"
        yield Finding("data folder", "wrong", f"{settings.data_dir} cannot be written to: {error.strerror}", advice)
        return
    free = shutil.disk_usage(folder).free
    detail = f"{settings.data_dir}, {size_text(free)} free"
    if free < _MIN_FREE_BYTES:
        yield Finding("data folder", "slow", detail, "make room: uploads are refused with 507 when it is full")
    else:
        yield Finding("data folder", "ok", detail)
    if sync_s > SLOW_SYNC_S:
        advice = "put the data folder on a local SSD: each upload waits for several of these"
        yield Finding("fsync", "slow", f"{sync_s * 1000:.1f} ms", advice)
    else:
        yield Finding("fsync", "ok", f"{sync_s * 1000:.1f} ms")


def check_cache_folder(settings: Settings) -> Iterator[Finding]:
    """Converted backbones and built kernels go there; kernels have to be executable."""
    from server.engine.built_files import may_execute

    folder = _nearest(settings.cache_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = "--cache-dir DIR, or PROMPTMUX_CACHE"
        yield Finding("cache folder", "wrong", f"{settings.cache_dir} cannot be written to", advice)
    elif not may_execute(folder):
        advice = "--cache-dir DIR on a file system that is not mounted noexec: kernels cannot be loaded from here"
        yield Finding("cache folder", "slow", f"{settings.cache_dir} is mounted noexec", advice)
    else:
        free = size_text(shutil.disk_usage(folder).free)
        yield Finding("cache folder", "ok", f"{settings.cache_dir}, {free} free")


def check_store(settings: Settings) -> Iterator[Finding]:
    """Whether this release can open the store, which is only read."""
    if settings.store is not None:
        yield from shared_store.check_shared_store(settings)
        return
    import sqlalchemy

    from prompt_store.folder import CATALOG_FILE
    from prompt_store.migrate import HEAD, current_revision, scripts

    file = settings.data_dir / CATALOG_FILE
    if not file.exists():
        yield Finding("store", "ok", "none yet; the first start makes it")
        return
    engine = _read_only(file)
    try:
        revision = current_revision(engine)
        with engine.connect() as connection:
            answer = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    except sqlalchemy.exc.SQLAlchemyError as error:
        advice = "restore a backup (docs/operations.md)"
        yield Finding("store", "wrong", f"{file} cannot be read: {error.__cause__ or error}", advice)
        return
    finally:
        engine.dispose()
    if answer != "ok":
        yield Finding("store", "wrong", f"{file} is damaged: {answer}", "restore a backup (docs/operations.md)")
    elif revision == HEAD:
        yield Finding("store", "ok", f"revision {revision}")
    elif revision is None or revision in {script.revision for script in scripts().walk_revisions()}:
        yield Finding("store", "ok", f"revision {revision}; the next start brings it to {HEAD}", "back it up first")
    else:
        advice = "use the release that wrote it, or restore a backup"
        yield Finding("store", "wrong", f"revision {revision} is of a newer release", advice)


def check_holder(settings: Settings) -> Iterator[Finding]:
    """Whether another process serves from the data folder: only one may. A database server's store may have several."""
    if settings.store is not None:
        return
    from prompt_store.folder import LOCK_FILE
    from prompt_store.locks import is_held

    file = settings.data_dir / LOCK_FILE
    if not is_held(file):
        yield Finding("data folder lock", "ok", "no server has it")
        return
    pid = file.read_text(encoding="ascii", errors="replace").strip()[:32]
    advice = "end that server, or give this one a --data-dir of its own; `promptmux doctor --url URL` looks at that one"
    detail = f"another server has {settings.data_dir}{f' (process {pid})' if pid else ''}"
    yield Finding("data folder lock", "wrong", detail, advice)


def check_port(settings: Settings) -> Iterator[Finding]:
    """Whether the address can be listened on now."""
    for flag, port in (("--port", settings.port), ("--metrics-port", settings.metrics_port)):
        error = None if port is None else _try_port(settings.host, port)
        if error is not None:
            advice = f"end what listens there (perhaps a promptmux that runs already: --url asks it), or {flag} 0"
            yield Finding("port", "wrong", f"{settings.host} port {port}: {error.strerror}", advice)
            return
    where = f"{settings.host} port {settings.port}"
    if is_loopback(settings.host):
        yield Finding("port", "ok", f"{where} is free; only this machine reaches it")
    elif _has_keys(settings):
        yield Finding("port", "ok", f"{where} is free; other machines reach it", "put TLS in front of it")
    else:
        advice = "serve refuses this without API keys: `promptmux keys create --data DIR|URL` makes one in the store"
        yield Finding("port", "wrong", f"other machines would reach {where}, and the store has no API key", advice)


def _try_port(host: str, port: int) -> OSError | None:
    """What keeps one from listening there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        return error
    return None


def _has_keys(settings: Settings) -> bool:
    if settings.store is not None:
        return shared_store.has_keys(settings)
    import sqlalchemy

    from prompt_store.folder import CATALOG_FILE
    from prompt_store.models import KeyRow

    engine = _read_only(settings.data_dir / CATALOG_FILE)
    try:
        with engine.connect() as connection:
            return connection.scalar(sqlalchemy.select(KeyRow.id).limit(1)) is not None
    except sqlalchemy.exc.SQLAlchemyError:
        # No store, or a damaged one, of which `check_store` tells.
        return False
    finally:
        engine.dispose()


def _read_only(file: Path) -> "sqlalchemy.Engine":
    """The store's database, for looks that leave no trace beside it."""
    import sqlalchemy

    query = {"mode": "ro", "uri": "true"}
    if not file.with_name(f"{file.name}-wal").exists():
        # Nobody has it open. SQLite would make the files of its log for the look, and leave them.
        query["immutable"] = "1"
    return sqlalchemy.create_engine(sqlalchemy.URL.create("sqlite", database=f"file:{file}", query=query))


def measure_sync(folder: Path) -> float:
    """Median seconds of a small write with fsync."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_NUM_SYNCS):
            started = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists: the server makes what is missing."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
