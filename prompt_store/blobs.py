"""Content-addressed bytes: a blob's name is the SHA-256 of its content, and nothing is stored under any other name.

Owns durability of single files and proof of their integrity. Knows nothing of tasks, versions or who refers to a blob;
`BlobStore` is the interface; `FileBlobs` keeps files in a folder, `database_blobs` rows in a shared database, and an
object store would be a third.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from prompt_store import failpoints
from prompt_store.errors import PromptCorrupt
from prompt_store.names import is_digest


class BlobStore(Protocol):
    """Bytes by digest. All methods may be called from any thread; OSErrors and errors of the
    database pass through."""

    def put(self, data: bytes) -> str:
        """Store `data` durably and return its digest; a damaged blob of that digest is replaced."""
        ...

    def get(self, digest: str) -> bytes:
        """The bytes, checked against `digest` on every call. Raises PromptCorrupt when missing or changed."""
        ...

    def exists(self, digest: str) -> bool: ...

    def delete(self, digest: str) -> None:
        """Remove the blob; nothing happens if there is none."""
        ...

    def digests(self) -> Iterator[str]:
        """The digests of all blobs, in no particular order."""
        ...


def missing(digest: str) -> PromptCorrupt:
    """What `get` raises for a blob that is not there."""
    return PromptCorrupt(f"The stored bytes of sha256:{digest} are missing.")


def check_content(digest: str, data: bytes) -> bytes:
    """Return `data`, or raise PromptCorrupt when that is not its digest."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise PromptCorrupt(f"The stored bytes of sha256:{digest} have changed: their digest no longer matches.")
    return data


class FileBlobs:
    """`blobs/ab/abcdef…` under `root`, written by way of `tmp/` on the same file system."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._temp = root / "tmp"
        for folder in (self._blobs, self._temp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _fsync_folder(root)

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if self._is_sound(digest):
            # Its entry may come from a put that failed before this point: acknowledge only what is durable.
            _fsync_folder(path.parent)
            return digest
        temp = self._temp / f"{digest}.{secrets.token_hex(8)}"
        try:
            _write_durably(temp, data)
            failpoints.hit(failpoints.BLOB_TEMP_WRITTEN)
            self._make_folder(path.parent)
            os.rename(temp, path)  # noqa: PTH104  os-level calls are where tests inject faults
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        failpoints.hit(failpoints.BLOB_RENAMED)
        _fsync_folder(path.parent)
        return digest

    def get(self, digest: str) -> bytes:
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise missing(digest) from error
        return check_content(digest, data)

    def exists(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def delete(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        for folder in self._blobs.iterdir():
            if folder.is_dir():
                yield from (path.name for path in folder.iterdir() if is_digest(path.name))

    def sweep_temp_files(self) -> None:
        """Remove what interrupted writes left behind. Only for the one process that writes to this folder."""
        for path in self._temp.iterdir():
            path.unlink(missing_ok=True)

    def _is_sound(self, digest: str) -> bool:
        try:
            self.get(digest)
        except PromptCorrupt:
            return False
        return True

    def _path(self, digest: str) -> Path:
        assert is_digest(digest), "a blob is only ever named by its digest"
        return self._blobs / digest[:2] / digest

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            _fsync_folder(self._blobs)


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            # A write may be short, for instance just before the disk is full.
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
