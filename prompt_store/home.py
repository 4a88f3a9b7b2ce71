"""What a store lives in, opened: its database, its blobs, and what keeps its writers and its memory in order.

The seam between the two kinds of home, a folder (`folder`) and a database that several replicas share (`shared`): what
builds on it does not know which of them it has.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prompt_store.availability import Availability
from prompt_store.blobs import BlobStore
from prompt_store.database import Database
from prompt_store.follower import ChangeListener


class Following(Protocol):
    """Whoever tells of other replicas' changes (`follower.Follower`)."""

    @property
    def num_reconnects(self) -> int: ...

    @property
    def position(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """`root` is None where there is no folder. `excluding` is held around each change and each addition to a log.

    `follow` makes the one who follows other replicas' changes; None where there are none, or nobody serves.
    `sweeps`: blobs that nothing refers to may be left over from an interrupted change, and are removed at the start.
    """

    root: Path | None
    database: Database
    blobs: BlobStore
    availability: Availability | None
    excluding: AbstractContextManager[None]
    follow: Callable[[ChangeListener], Following] | None
    sweeps: bool
    close: Callable[[], None]
