"""A store in PostgreSQL, as a server would find it: reached, how fast it answers, and of which release. Only read."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.doctor.findings import Finding
from server.settings import Settings

if TYPE_CHECKING:
    from prompt_store.postgresql import PostgresDatabase

_NUM_ANSWERS = 5
SLOW_ANSWER_S = 0.02


def check_shared_store(settings: Settings) -> Iterator[Finding]:
    """Whether this release can open the store, and how long each look at it takes."""
    from prompt_store.errors import PromptStoreError
    from prompt_store.faults import storage_errors
    from prompt_store.location import show_location
    from prompt_store.migrate import HEAD, current_revision, scripts
    from prompt_store.shared import check_server

    where = show_location(settings.store_location)
    try:
        with _database(settings) as database, storage_errors():
            revision = current_revision(database.engine)
            check_server(database)
            answer_s = _measure_answer(database)
    except PromptStoreError as error:
        yield Finding("store", "wrong", f"{where}: {error.message}", "psql URL, which says more about what is wrong")
        return
    known = {script.revision for script in scripts().walk_revisions()}
    if revision == HEAD:
        yield Finding("store", "ok", f"{where}, revision {revision}")
    elif revision is None:
        yield Finding("store", "ok", f"{where}, empty; the first start makes it")
    elif revision in known:
        detail = f"{where}, revision {revision}; the next start brings it to {HEAD}"
        yield Finding("store", "ok", detail, "back it up first (docs/postgresql.md)")
    else:
        advice = "use the release that wrote it, or restore a backup"
        yield Finding("store", "wrong", f"{where}: revision {revision} is of a newer release", advice)
    if answer_s > SLOW_ANSWER_S:
        advice = "put the database nearer: each name that is not remembered costs three such times"
        yield Finding("store's answer", "slow", f"{answer_s * 1000:.1f} ms", advice)
    else:
        yield Finding("store's answer", "ok", f"{answer_s * 1000:.1f} ms")


def has_keys(settings: Settings) -> bool:
    """Whether any key was made; False also where the store cannot be read, of which `check_shared_store` tells."""
    from prompt_store.errors import PromptStoreError
    from prompt_store.keyring import Keyring

    try:
        with _database(settings) as database:
            return Keyring(database).has_keys()
    except PromptStoreError:
        return False


@contextmanager
def _database(settings: Settings) -> "Iterator[PostgresDatabase]":
    from prompt_store.availability import Availability
    from prompt_store.location import parse_store_url
    from prompt_store.postgresql import PostgresDatabase

    assert settings.store is not None
    database = PostgresDatabase(parse_store_url(settings.store.get_secret_value()), Availability(max_stale_s=0))
    try:
        yield database
    finally:
        database.close()


def _measure_answer(database: "PostgresDatabase") -> float:
    """Median seconds of a question that the database need not think about."""
    times = []
    with database.engine.connect() as connection:
        for _ in range(_NUM_ANSWERS):
            started = time.perf_counter()
            connection.exec_driver_sql("SELECT 1").scalar()
            times.append(time.perf_counter() - started)
    return statistics.median(times)
