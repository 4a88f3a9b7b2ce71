from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prompt_store.location import Location
from prompt_store.models import Base
from prompt_store.shared_models import SharedBase
from prompt_store.store import PromptStore
from tests.postgresql import PostgresServer
from tests.unit.prompt_store.prompt_files import BACKBONE

OpenStore = Callable[[Location], PromptStore]
TABLES = [table for base in (Base, SharedBase) for table in base.metadata.tables]


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer) -> str:
    """The name of a database with an empty store in it, to make others of."""
    name = postgres.create_database()
    PromptStore.open(postgres.url(name), exclusive=False).close()
    return name


@pytest.fixture(scope="session")
def emptied() -> list[str]:
    """The name of a database that a test has had and that is as good as new, if there is one."""
    return []


@pytest.fixture
def url(postgres: PostgresServer, migrated: str, emptied: list[str]) -> Iterator[str]:
    """A fresh store in PostgreSQL. To empty one takes a third of the time that it takes to make another."""
    name = emptied.pop() if emptied else postgres.create_database(migrated)
    yield postgres.url(name)
    # Whoever is left in it goes first: processes that were killed, and stores that were not closed.
    others = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"
    postgres.execute(f"{others} AND pid != pg_backend_pid()")
    try:
        postgres.execute(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY", name)
    except RuntimeError:
        # The test has changed its tables.
        postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")
    else:
        emptied.append(name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a fresh store."""
    return tmp_path / "store"


@pytest.fixture(params=["folder", "postgresql"])
def location(request: pytest.FixtureRequest) -> Location:
    """Where a fresh store may be made, of each kind in turn."""
    made: Location = request.getfixturevalue("root" if request.param == "folder" else "url")
    return made


@pytest.fixture
def store(location: Location) -> Iterator[PromptStore]:
    with PromptStore.open(location, backbone=BACKBONE) as opened:
        yield opened


@pytest.fixture
def folder_store(root: Path) -> Iterator[PromptStore]:
    """For what only a folder has: files, and faults of a disk."""
    with PromptStore.open(root, backbone=BACKBONE) as opened:
        yield opened


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens stores that are closed at the end."""
    with ExitStack() as opened:
        yield lambda location: opened.enter_context(PromptStore.open(location, backbone=BACKBONE))
