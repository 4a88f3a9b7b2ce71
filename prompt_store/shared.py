"""A store's home in PostgreSQL, which any number of replicas share. Opened and migrated; there is nothing to lock."""

import contextlib
from functools import partial

from prompt_store import migrate
from prompt_store.availability import Availability
from prompt_store.database_blobs import DatabaseBlobs
from prompt_store.errors import StorageFailed
from prompt_store.faults import storage_errors
from prompt_store.follower import Follower
from prompt_store.home import Home
from prompt_store.location import parse_store_url
from prompt_store.postgresql import PostgresDatabase

MIN_SERVER_VERSION = 15


def open_shared(url: str, *, serves: bool, max_stale_s: float) -> Home:
    """Migrated if need be, by one of those that open it at the same time. Raises StorageUnavailable or StorageFailed.

    With `serves` other replicas' changes are followed; without, for a short while and beside others, they are not, and
    nothing is remembered for longer than a second.
    """
    availability = Availability(max_stale_s=max_stale_s)
    with contextlib.ExitStack() as undo, storage_errors():
        database = PostgresDatabase(parse_store_url(url), availability)
        undo.callback(database.close)
        revision = migrate.current_revision(database.engine)
        check_server(database)
        if revision != migrate.HEAD:
            with database.migrating() as engine:
                migrate.upgrade(engine)
        return Home(
            root=None,
            database=database,
            blobs=DatabaseBlobs(database),
            availability=availability if serves else None,
            excluding=contextlib.nullcontext(),
            follow=partial(Follower, database) if serves else None,
            # What a change did not commit was never there.
            sweeps=False,
            close=undo.pop_all().close,
        )


def check_server(database: PostgresDatabase) -> None:
    """Raises StorageFailed for a release, or an encoding, that cannot hold a store."""
    with database.engine.connect() as connection:
        version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if version < MIN_SERVER_VERSION * 10_000:
        raise StorageFailed(
            f"The store's database is PostgreSQL {version // 10_000}; {MIN_SERVER_VERSION} or later is needed."
        )
    if encoding != "UTF8":
        raise StorageFailed(f"The store's database has the encoding {encoding}; UTF8 is needed.")
