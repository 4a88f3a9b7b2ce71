"""Files that are run as code, kept in a cache folder: written whole, and looked at before they are mapped.

A library that was cut short (a crash before its bytes reached the disk, a full disk) does not fail to load: it ends
the process with SIGBUS, at every start. So each file has its SHA-256 beside it. Knows nothing of what is in the files.
"""

import contextlib
import hashlib
import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

from server.embedded import fsync


def publish(made: Path, path: Path) -> None:
    """Move `made`, on the same file system, to `path`: whole and on the disk, its digest before it, or not at all."""
    fsync(made)
    beside = _digest_file(path)
    # The digest goes first: between the two renames the file counts as broken, never as whole when it is not.
    temporary = made.with_name(f"{made.name}.digest")
    temporary.write_text(_digest(made))
    fsync(temporary)
    temporary.replace(beside)
    made.replace(path)
    fsync(path.parent)


def is_whole(path: Path) -> bool:
    """Whether the file is there with exactly the bytes that were published; reads it all."""
    try:
        return _digest_file(path).read_text().strip() == _digest(path)
    except OSError:
        return False


def discard(path: Path) -> None:
    """Remove a published file; processes that have it mapped keep it."""
    for file in (path, _digest_file(path)):
        file.unlink(missing_ok=True)


def keep_newest(paths: Iterable[Path], count: int) -> None:
    """Discard all but the files that were last written or `touch`ed. Whoever cannot find one makes it again."""
    dated = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            dated.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(dated, reverse=True)[count:]:
        with contextlib.suppress(OSError):
            discard(path)


def may_execute(folder: Path) -> bool:
    """Whether files of this folder can be mapped as code: not where it is mounted noexec, as a container's tmpfs is.

    Raises OSError when the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
        file.flush()
        try:
            mmap.mmap(file.fileno(), 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
        except OSError:
            return False
    return True


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
