"""Several replicas of one store in PostgreSQL: what one changes holds at the others, in the order of commits."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, create_engine, func, insert, select, text

from prompt_store import follower
from prompt_store.changes import NUM_KEPT, Change, append_change, newest_mark, read_news
from prompt_store.errors import QuotaExceeded, StorageFailed, StorageUnavailable, TaskNotFound, VersionConflict
from prompt_store.location import parse_store_url
from prompt_store.manifest import Canary, Quota
from prompt_store.postgresql import PostgresDatabase
from prompt_store.shared_models import ChangeRow
from prompt_store.store import PromptStore
from tests.postgresql import PostgresServer
from tests.unit.prompt_store.conftest import OpenStore
from tests.unit.prompt_store.prompt_files import BACKBONE, CONFIG, make_file, put
from tests.unit.prompt_store.test_store_tenants import make_receipt

DEADLINE_S = 20.0


@pytest.fixture
def pair(url: str, open_store: OpenStore) -> tuple[PromptStore, PromptStore]:
    """Two replicas of one store."""
    return open_store(url), open_store(url)


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    engine = create_engine(parse_store_url(url))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes true; that it does so in time is measured elsewhere."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.002)
    return True


def active(store: PromptStore, reference: str = "task", tenant: str = "acme") -> int | None:
    try:
        return store.resolve(tenant, reference).version
    except TaskNotFound:
        return None


def database_of(store: PromptStore) -> PostgresDatabase:
    database = store._database
    assert isinstance(database, PostgresDatabase)
    return database


def test_every_kind_of_change_is_in_force_at_the_other_replica(pair: tuple[PromptStore, PromptStore]) -> None:
    one, two = pair
    put(one, 1)
    assert eventually(lambda: active(two) == 1)
    put(one, 2)
    assert eventually(lambda: active(two) == 2)
    one.rollback("acme", "task")
    assert eventually(lambda: active(two) == 1)
    one.update_task("acme", "task", active_version=2, canary=Canary(1, 50))
    assert eventually(lambda: active(two) == 2)
    assert eventually(lambda: {two.resolve("acme", "task", request_id=str(i)).version for i in range(20)} == {1, 2})
    one.update_task("acme", "task", canary=None)
    assert eventually(lambda: {two.resolve("acme", "task", request_id=str(i)).version for i in range(20)} == {2})
    one.delete_version("acme", "task", 1)
    assert eventually(lambda: active(two, "task@1") is None)
    one.delete_task("acme", "task")
    assert eventually(lambda: active(two) is None)


def test_replicas_that_know_the_same_changes_have_the_same_position(pair: tuple[PromptStore, PromptStore]) -> None:
    one, two = pair
    before = one.health().position
    put(one, 1)
    put(two, 2)
    assert eventually(lambda: one.health().position == two.health().position >= before + 2)


def test_change_of_a_shared_task_is_in_force_for_every_tenant_that_remembers_it(
    pair: tuple[PromptStore, PromptStore],
) -> None:
    one, two = pair
    put(one, 1, tenant="shared")
    assert eventually(lambda: active(two, tenant="acme") == active(two, tenant="zeta") == 1)
    put(one, 2, tenant="shared")
    assert eventually(lambda: active(two, tenant="acme") == active(two, tenant="zeta") == 2)


def test_change_makes_nothing_else_be_asked_anew(pair: tuple[PromptStore, PromptStore]) -> None:
    one, two = pair
    put(one, 1, task="kept")
    put(one, 1)
    # What was read while a change came in is not remembered: once more then.
    for task in ("task", "kept"):
        assert eventually(lambda t=task: active(two, t) == 1 and two.resolve_remembered("acme", t) is not None)
    put(one, 2)
    assert eventually(lambda: two.resolve_remembered("acme", "task") is None)
    assert two.resolve_remembered("acme", "kept") is not None


def test_without_notifications_the_log_is_looked_at_anyway(
    url: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "NOTIFICATION_CHANNEL", "nobody")
    one, two = open_store(url), open_store(url)
    put(one, 1)
    assert eventually(lambda: active(two) == 1)
    put(one, 2)
    assert eventually(lambda: active(two) == 2)


def test_of_two_interleaved_changes_none_is_seen_before_one_with_a_lower_number(
    pair: tuple[PromptStore, PromptStore], connection: Connection
) -> None:
    one, two = pair
    begun, release = threading.Event(), threading.Event()

    def first() -> None:
        with database_of(one).changing("acme", "first"):
            with database_of(one).writing() as session:
                session.execute(text("INSERT INTO quotas (tenant, updated_at) VALUES ('first', now())"))
            begun.set()
            assert release.wait(DEADLINE_S)

    def second() -> None:
        with database_of(two).changing("acme", "second"), database_of(two).writing() as session:
            session.execute(text("INSERT INTO quotas (tenant, updated_at) VALUES ('second', now())"))

    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with ThreadPoolExecutor(2) as threads:
        doing = [threads.submit(first)]
        assert begun.wait(DEADLINE_S)
        doing.append(threads.submit(second))
        # The second has begun after the first, and waits: were it to commit now, a reader would pass the first by.
        assert eventually(lambda: connection.scalar(text(waiting)) == 1)
        assert not doing[1].done()
        assert read_news(connection, None).changes == ()
        connection.rollback()
        release.set()
        for work in doing:
            work.result(DEADLINE_S)
    news = read_news(connection, None)
    assert [(change.id, change.task) for change in news.changes] == [(1, "first"), (2, "second")]


@pytest.mark.parametrize("log", ["audit", "receipts"])
def test_log_that_is_followed_by_its_ids_is_added_to_by_one_replica_at_a_time(
    pair: tuple[PromptStore, PromptStore], connection: Connection, log: str
) -> None:
    one, two = pair
    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        with database_of(one).appending(log):
            begun.set()
            assert release.wait(DEADLINE_S)

    def add() -> None:
        if log == "audit":
            two.audit("acme", actor="ann", action="note")
        else:
            two.append_receipts([make_receipt("r")], max_rows=10)

    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with ThreadPoolExecutor(2) as threads:
        doing = [threads.submit(hold)]
        assert begun.wait(DEADLINE_S)
        doing.append(threads.submit(add))
        assert eventually(lambda: connection.scalar(text(waiting)) == 1)
        connection.rollback()
        assert list(one.iter_audit()) == list(one.iter_receipts()) == []
        release.set()
        for work in doing:
            work.result(DEADLINE_S)
    assert len([*one.iter_audit(), *one.iter_receipts()]) == 1
    # It changes no name's meaning, and so nobody is told.
    assert read_news(connection, None).changes == ()


def test_numbers_of_a_sequence_would_have_been_seen_out_of_order(connection: Connection) -> None:
    """Why changes do not take theirs from one: the reader below misses a change for good."""
    connection.execute(text("CREATE TABLE naive (id bigserial PRIMARY KEY, task text)"))
    connection.commit()
    with connection.engine.connect() as first, connection.engine.connect() as second:
        first.execute(text("INSERT INTO naive (task) VALUES ('first')"))
        second.execute(text("INSERT INTO naive (task) VALUES ('second')"))
        second.commit()
        seen = list(connection.execute(text("SELECT id, task FROM naive WHERE id > 0 ORDER BY id")))
        connection.rollback()
        first.commit()
        seen += list(connection.execute(text(f"SELECT id, task FROM naive WHERE id > {seen[-1].id} ORDER BY id")))
    assert [row.task for row in seen] == ["second"]


def test_rolled_back_change_leaves_no_gap_and_tells_nobody(
    pair: tuple[PromptStore, PromptStore], connection: Connection
) -> None:
    one, _ = pair
    put(one, 1)
    with pytest.raises(VersionConflict):
        put(one, 2, expected_version=9)
    with pytest.raises(QuotaExceeded):
        put(one, 3, quota=Quota(tenant="acme", max_prompts=1))
    put(one, 1)
    one.rollback("acme", "task", to=1)
    put(one, 4)
    assert [change.id for change in read_news(connection, None).changes] == [1, 2, 3]


def test_many_writers_at_several_replicas_leave_one_order_that_all_agree_on(url: str, open_store: OpenStore) -> None:
    stores = [open_store(url) for _ in range(3)]

    def write(number: int) -> None:
        store = stores[number % 3]
        store.upload("acme", f"task-{number % 4}", file=make_file(seed=number), config=CONFIG)
        if number % 5 == 0:
            store.update_task("acme", f"task-{number % 4}", pinned=True)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(write, range(36)))
    for task in range(4):
        expected = stores[0].get_task("acme", f"task-{task}").active_version
        assert all(eventually(lambda s=store, t=task, e=expected: active(s, f"task-{t}") == e) for store in stores)
    stores[0].check_invariants()
    entries = [entry.id for entry in stores[1].iter_audit()]
    assert entries == sorted(entries)
    assert stores[2].counts().num_versions == 36


def test_two_replicas_that_upload_one_task_at_once_one_wins(pair: tuple[PromptStore, PromptStore]) -> None:
    put(pair[0], 0)
    barrier = threading.Barrier(2)

    def write(side: int) -> int | None:
        barrier.wait()
        try:
            return put(pair[side], 10 + side, expected_version=1).version
        except VersionConflict:
            return None

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(write, range(2)))
    assert sorted(outcomes, key=str) == [2, None]
    assert all(eventually(lambda s=store: active(s) == 2) for store in pair)


def test_stored_amounts_are_bounded_for_all_replicas_together(pair: tuple[PromptStore, PromptStore]) -> None:
    quota = Quota(tenant="acme", max_prompts=3)

    def write(number: int) -> bool:
        try:
            put(pair[number % 2], number, task=f"task-{number}", quota=quota)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(write, range(8)))
    assert outcomes.count(True) == 3
    assert pair[0].stored_amounts("acme")["acme"].num_prompts == 3


def test_listener_is_told_of_others_changes_alone(pair: tuple[PromptStore, PromptStore]) -> None:
    one, two = pair
    heard: list[Change] = []
    two.on_foreign_change(heard.extend)
    put(two, 1, task="own")
    put(one, 1, task="foreign")
    assert eventually(lambda: bool(heard))
    assert [(change.tenant, change.task) for change in heard] == [("acme", "foreign")]
    assert heard[0].age_s >= 0


def test_log_that_was_cut_or_replaced_makes_everything_be_forgotten(
    pair: tuple[PromptStore, PromptStore], connection: Connection
) -> None:
    one, two = pair
    told: list[int] = []
    two.on_foreign_change(lambda changes: told.append(len(changes)))
    put(one, 1)
    assert eventually(lambda: active(two) == 1)
    # Another past under the same numbers, as after a backup was put back: only the row itself can tell.
    connection.execute(text("UPDATE tasks SET active_version = NULL"))
    connection.execute(text("UPDATE changes SET origin = 'another'"))
    connection.execute(select(func.pg_notify(follower.NOTIFICATION_CHANNEL, "")))
    connection.commit()
    assert eventually(lambda: active(two) is None)
    assert 0 in told


def test_log_keeps_what_a_reader_may_be_behind_and_no_more(connection: Connection) -> None:
    now = func.clock_timestamp()
    rows = [{"id": number, "origin": "o"} for number in range(1, NUM_KEPT + 100)]
    connection.execute(insert(ChangeRow).values(at=now), rows)
    append_change(connection, "me", "acme", "task")
    lowest = connection.scalar(select(func.min(ChangeRow.id)))
    mark = newest_mark(connection)
    assert (lowest, mark and mark.id) == (101, NUM_KEPT + 100)
    assert not read_news(connection, mark).is_broken
    assert read_news(connection, None).is_broken


def test_news_come_in_pages_and_end(connection: Connection) -> None:
    rows = [{"id": number, "origin": "o", "task": f"t{number}"} for number in range(1, 2503)]
    connection.execute(insert(ChangeRow).values(at=func.clock_timestamp()), rows)
    found, mark, num_pages = [], None, 0
    while True:
        news = read_news(connection, mark)
        assert not news.is_broken
        found += [change.id for change in news.changes]
        mark, num_pages = news.mark, num_pages + 1
        if news.is_last:
            break
    assert found == list(range(1, 2503))
    assert num_pages == 3


def test_replicas_that_start_at_once_on_an_empty_database_migrate_it_once(postgres: PostgresServer) -> None:
    with postgres.database() as url, ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: PromptStore.open(url, backbone=BACKBONE), range(4)))
        try:
            put(stores[0], 1)
            assert all(eventually(lambda s=store: active(s) == 1) for store in stores)
        finally:
            for store in stores:
                store.close()


def test_store_beside_others_remembers_nothing_for_long(url: str, open_store: OpenStore) -> None:
    serving = open_store(url)
    put(serving, 1)
    with PromptStore.open(url, exclusive=False) as beside:
        assert active(beside) == 1
        put(serving, 2)
        assert eventually(lambda: active(beside) == 2)
        assert beside.health().is_reachable


def test_bytes_are_kept_out_of_line_and_uncompressed(url: str, connection: Connection, open_store: OpenStore) -> None:
    version = put(open_store(url), 1)
    storage = "SELECT attstorage FROM pg_attribute WHERE attrelid = 'blobs'::regclass AND attname = 'data'"
    # PostgreSQL's internal type "char", which drivers give as bytes or as text.
    assert connection.scalar(text(storage)) in ("e", b"e")
    assert connection.scalar(text(f"SELECT length(data) FROM blobs WHERE digest = '{version.digest}'")) > 0


def test_names_are_paged_by_code_points_whatever_the_databases_language(pair: tuple[PromptStore, PromptStore]) -> None:
    names = ["a-b", "a.b", "a0", "a_b", "ab", "a-c", "b", "a"]
    for name in names[::2]:
        put(pair[0], 1, task=name)
    for name in names[1::2]:
        put(pair[0], 1, task=name, tenant="shared")
    found: list[str] = []
    while page := pair[0].list_visible("acme", limit=2, after=found[-1] if found else None):
        found += [task.task for task, _ in page]
    assert found == sorted(names)


def test_wrong_database_is_refused_with_a_reason(postgres: PostgresServer, url: str) -> None:
    with pytest.raises(StorageUnavailable, match="cannot be reached") as refused:
        PromptStore.open(url.replace("promptmux@", "promptmux:hunter2@").replace(str(postgres.folder), "/nowhere"))
    assert "hunter2" not in str(refused.value)
    postgres.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING LATIN1 LOCALE_PROVIDER libc LOCALE 'C'")
    with pytest.raises(StorageFailed, match="LATIN1"):
        PromptStore.open(postgres.url("latin"))
