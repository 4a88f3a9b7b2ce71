"""A store's home in a folder: files, a SQLite catalog, and locks. Opened, migrated, swept, locked, given back."""

import contextlib
from pathlib import Path

from prompt_store import migrate
from prompt_store.blobs import FileBlobs
from prompt_store.faults import storage_errors
from prompt_store.home import Home
from prompt_store.locks import FolderLock, WriteLock
from prompt_store.sqlite import SqliteDatabase

CATALOG_FILE = "catalog.sqlite3"
LOCK_FILE = "store.lock"


def open_folder(root: Path, *, exclusive: bool) -> Home:
    """Made and migrated if need be. Raises StoreInUse, StorageFailed or StorageFull.

    With `exclusive` the folder is this process's until it is closed, and leftovers of interrupted writes are swept;
    without, it is opened beside whoever serves it.
    """
    with contextlib.ExitStack() as undo, storage_errors():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if exclusive:
            undo.callback(FolderLock(root / LOCK_FILE).release)
        database = SqliteDatabase(root / CATALOG_FILE)
        undo.callback(database.close)
        write_lock = WriteLock(root / "write.lock")
        undo.callback(write_lock.close)
        blobs = FileBlobs(root)
        with write_lock:
            migrate.upgrade(database.engine)
            if exclusive:
                blobs.sweep_temp_files()
        return Home(
            root=root,
            database=database,
            blobs=blobs,
            availability=None,
            excluding=write_lock,
            follow=None,
            sweeps=exclusive,
            close=undo.pop_all().close,
        )
