"""Opens the home of a store, of whichever kind its location says."""

from pathlib import Path

from prompt_store.folder import open_folder
from prompt_store.home import Home
from prompt_store.location import Location
from prompt_store.shared import open_shared

# How long a replica whose database is away answers from memory.
MAX_STALE_S = 300.0


def open_home(location: Location, *, exclusive: bool, max_stale_s: float = MAX_STALE_S) -> Home:
    """Made and migrated if need be; `exclusive` is for who serves it, or may have nobody serve it meanwhile.

    Raises StoreInUse, StorageUnavailable, StorageFailed or StorageFull; InvalidValue for a URL that is none.
    """
    if isinstance(location, Path):
        return open_folder(location, exclusive=exclusive)
    return open_shared(location, serves=exclusive, max_stale_s=max_stale_s)
