"""Locks on the store's folder, between threads and between processes (`flock`: the kernel drops them on any death)."""

import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType

from prompt_store.errors import StorageFailed, StoreInUse


class FolderLock:
    """Held from open to close by the one process that serves a folder."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 32).decode("ascii", "replace").strip()
            self.release()
            raise StoreInUse(
                f"The folder {path.parent} is served by another process{f' (pid {holder})' if holder else ''}. "
                "Stop it, or give this one a folder of its own."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_held(path: Path) -> bool:
    """Whether some process has the folder lock at `path`; nothing is written, nor made where there is nothing.

    A server that starts in the very instant of the look may be told that the folder is taken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class WriteLock:
    """Held for each change: a blob is never collected while another writer is about to refer to it. Not reentrant."""

    def __init__(self, path: Path) -> None:
        self._thread_lock = threading.Lock()
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        self._thread_lock.acquire()
        try:
            if self._descriptor is None:
                raise StorageFailed("The prompt store is closed.")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except BaseException:
            self._thread_lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            assert self._descriptor is not None
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def close(self) -> None:
        with self._thread_lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
