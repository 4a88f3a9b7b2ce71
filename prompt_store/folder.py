"""The folder that a store lives in: opened, migrated, swept, locked, given back.

Owns the parts that every door of the store works with, and the order in which they are opened and closed. Knows nothing
of what prompts, tasks or keys may do: that is for the classes that build on it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import URL

from prompt_store import migrate
from prompt_store.blobs import BlobStore, FileBlobs
from prompt_store.catalog import Catalog
from prompt_store.custody import Custody
from prompt_store.database import Database
from prompt_store.faults import storage_errors
from prompt_store.locks import FolderLock, WriteLock
from prompt_store.manifest import BackboneShape, StoreLimits
from prompt_store.resolve_cache import ResolveCache

CATALOG_FILE = "catalog.sqlite3"


class StoreFolder:
    """All methods may be called from any thread."""

    def __init__(
        self,
        root: Path,
        *,
        database: Database,
        blobs: BlobStore,
        write_lock: WriteLock,
        folder_lock: FolderLock | None,
        backbone: BackboneShape | None,
        limits: StoreLimits,
    ) -> None:
        self.root = root
        self.limits = limits
        self._database = database
        self._blobs = blobs
        self._write_lock = write_lock
        self._folder_lock = folder_lock
        self._backbone = backbone
        self._catalog = Catalog(database)
        self._custody = Custody(self._catalog, blobs, self._changing)
        self._cache = ResolveCache(database.change_token)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        backbone: BackboneShape | None = None,
        limits: StoreLimits | None = None,
        exclusive: bool = True,
    ) -> Self:
        """Open the store in folder `root`, made and migrated if need be.

        With `exclusive` the folder is this process's until `close`, and leftovers of interrupted writes are swept;
        without, it is opened beside whoever serves it. Raises StoreInUse, StorageFailed or StorageFull.
        """
        with contextlib.ExitStack() as undo, storage_errors():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder_lock = FolderLock(root / "store.lock") if exclusive else None
            if folder_lock is not None:
                undo.callback(folder_lock.release)
            write_lock = WriteLock(root / "write.lock")
            undo.callback(write_lock.close)
            database = Database(URL.create("sqlite", database=str(root / CATALOG_FILE)))
            undo.callback(database.close)
            blobs = FileBlobs(root)
            with write_lock:
                migrate.upgrade(database.engine)
                if exclusive:
                    blobs.sweep_temp_files()
            store = cls(
                root,
                database=database,
                blobs=blobs,
                write_lock=write_lock,
                folder_lock=folder_lock,
                backbone=backbone,
                limits=limits or StoreLimits(),
            )
            if exclusive:
                store._custody.sweep()
            undo.pop_all()
        return store

    def close(self) -> None:
        """Give the folder back. A second call does nothing."""
        self._write_lock.close()
        self._database.close()
        if self._folder_lock is not None:
            self._folder_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._write_lock:
            try:
                yield
            finally:
                self._cache.clear()
