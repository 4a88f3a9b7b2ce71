"""A shared store whose database goes away: what is remembered is served, writes are refused, and all is well after."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, text

from prompt_store import follower, postgresql
from prompt_store.errors import StorageFailed, StorageUnavailable, TaskNotFound
from prompt_store.manifest import Quota
from prompt_store.store import PromptStore
from prompt_store.watchdog import OpenSockets
from tests.postgresql import PostgresServer
from tests.unit.prompt_store.conftest import OpenStore
from tests.unit.prompt_store.prompt_files import BACKBONE, put

DEADLINE_S = 30.0
BACKENDS = "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE application_name = 'promptmux'"


@pytest.fixture
def stoppable(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """The server, which runs again after the test."""
    yield postgres
    postgres.stop()
    postgres.start()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True


def is_away(call: Callable[[], object]) -> bool:
    try:
        call()
    except StorageUnavailable:
        return True
    except TaskNotFound:
        return False
    return False


def database_of(store: PromptStore) -> postgresql.PostgresDatabase:
    database = store._database
    assert isinstance(database, postgresql.PostgresDatabase)
    return database


def active_or_away(store: PromptStore) -> int | None:
    """None where the name is not remembered and cannot be asked for."""
    try:
        return store.resolve("acme", "task").version
    except StorageUnavailable:
        return None


def test_what_is_remembered_is_served_while_the_database_is_away_and_all_is_caught_up_after(
    stoppable: PostgresServer, url: str, open_store: OpenStore
) -> None:
    one, two = open_store(url), open_store(url)
    known = put(one, 1)
    put(one, 1, task="never-asked-for")
    _, secret = one.create_key("acme", {"infer"})
    one.set_quota(Quota(tenant="acme", max_prompts=9))
    # What was read while a change came in is not remembered.
    assert eventually(lambda: two.resolve("acme", "task") == two.resolve_remembered("acme", "task") == known)
    assert eventually(lambda: two.health().position == 4)
    key, quota = two.verify_key(secret), two.get_quota("acme")
    assert two.has_keys()
    assert two.verify_key("pm_wrong") is None

    stoppable.stop()
    assert eventually(lambda: not (one.health().is_reachable or two.health().is_reachable))
    assert two.resolve("acme", "task") == known
    assert two.resolve_remembered("acme", "task") == known
    assert (two.verify_key(secret), two.get_quota("acme"), two.has_keys()) == (key, quota, True)
    for refused in (
        lambda: put(two, 2),
        lambda: two.rollback("acme", "task"),
        lambda: two.create_key("acme", {"infer"}),
        lambda: two.resolve("acme", "never-asked-for"),
        lambda: two.verify_key("pm_wrong"),
        lambda: two.load(known),
        lambda: list(two.iter_audit()),
    ):
        with pytest.raises(StorageUnavailable, match="cannot be reached; nothing was changed"):
            refused()
    # What was asked for in vain, changes above all, costs nothing of what is remembered.
    assert two.resolve("acme", "task") == known
    assert (two.verify_key(secret), two.get_quota("acme"), two.has_keys()) == (key, quota, True)

    stoppable.start()
    assert eventually(lambda: one.health().is_reachable and two.health().is_reachable)
    assert put(one, 2).version == 2
    assert eventually(lambda: two.resolve("acme", "task").version == 2)
    assert two.health().num_reconnects >= 1
    assert two.load(two.resolve("acme", "task")).num_virtual_tokens == known.num_virtual_tokens
    two.check_invariants()


def test_key_that_was_revoked_before_the_database_went_away_is_good_nowhere(
    stoppable: PostgresServer, url: str, open_store: OpenStore
) -> None:
    one, two = open_store(url), open_store(url)
    key, secret = one.create_key("acme", {"infer"})
    _, kept = one.create_key("acme", {"infer"})
    assert eventually(lambda: two.health().position == 2)
    assert one.verify_key(secret) == two.verify_key(secret) == key
    one.revoke_key(key.id)
    # What is no tenant's key or quota takes nothing away.
    assert eventually(lambda: two.health().position == 3)
    known = one.verify_key(kept), two.verify_key(kept)
    one.add_training_file("acme", b"{}", filename="a.jsonl", num_examples=1)
    assert eventually(lambda: two.health().position == 4)
    stoppable.stop()
    assert eventually(lambda: not (one.health().is_reachable or two.health().is_reachable))
    for store in (one, two):
        with pytest.raises(StorageUnavailable):
            store.verify_key(secret)
    assert (one.verify_key(kept), two.verify_key(kept)) == known
    stoppable.start()


def test_change_that_was_made_while_a_replica_could_not_listen_is_in_force_once_it_is_back(
    postgres: PostgresServer, url: str, open_store: OpenStore
) -> None:
    one, two = open_store(url), open_store(url)
    put(one, 1)
    assert two.resolve("acme", "task").version == 1
    for seed in (2, 3, 4):
        # All connections but psql's own, in the midst of whatever they do.
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'promptmux'")
        assert eventually(lambda s=seed: not is_away(lambda: put(one, s)))
        assert eventually(lambda s=seed: active_or_away(two) == s)
    assert eventually(lambda: two.health().num_reconnects >= 3)


def test_what_is_remembered_is_believed_for_so_long_and_no_longer(stoppable: PostgresServer, url: str) -> None:
    with PromptStore.open(url, backbone=BACKBONE, max_stale_s=1.0) as store:
        put(store, 1)
        _, secret = store.create_key("acme", {"infer"})
        assert eventually(lambda: store.resolve("acme", "task") == store.resolve_remembered("acme", "task"))
        store.verify_key(secret)
        stoppable.stop()
        assert eventually(lambda: not store.health().is_reachable)
        assert eventually(lambda: is_away(lambda: store.resolve("acme", "task")))
        assert store.health().stale_s > 1.0
        assert is_away(lambda: store.verify_key(secret))
        assert store.resolve_remembered("acme", "task") is None
        stoppable.start()
        assert eventually(lambda: not is_away(lambda: store.resolve("acme", "task")))


def test_store_cannot_be_opened_while_its_database_is_away(stoppable: PostgresServer, url: str) -> None:
    stoppable.stop()
    with pytest.raises(StorageUnavailable):
        PromptStore.open(url)
    stoppable.start()
    PromptStore.open(url).close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_at_the_commit_is_told_as_an_unknown_outcome(
    postgres: PostgresServer, url: str, open_store: OpenStore, when: str
) -> None:
    store = open_store(url)
    put(store, 1)
    engine = store._database.engine
    real = engine.dialect.do_commit

    def commit(connection: Any) -> None:
        pid = connection.driver_connection.info.backend_pid
        if when == "after":
            real(connection)
        postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
        # The answer to the commit is what gets lost: either it was carried out or it was not.
        connection.driver_connection.execute("SELECT 1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.dialect, "do_commit", commit)
        with pytest.raises(StorageUnavailable, match="may have been made"):
            put(store, 2)
    assert eventually(lambda: store.health().is_reachable)
    assert store.get_task("acme", "task").active_version == (2 if when == "after" else 1)
    assert put(store, 2).version == 2


def test_commit_that_is_carried_out_after_its_answer_was_given_up_is_in_force_where_it_was_made(
    url: str, open_store: OpenStore
) -> None:
    store = open_store(url)
    put(store, 1)
    engine = store._database.engine
    hanging: list[int] = []

    def commit(connection: Any) -> None:
        driver = connection.driver_connection
        hanging.append(driver.info.backend_pid)
        os.kill(hanging[0], signal.SIGSTOP)
        driver.pgconn.send_query(b"COMMIT")
        driver.pgconn.flush()
        driver.close()
        raise engine.dialect.loaded_dbapi.OperationalError("the connection is lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.dialect, "do_commit", commit)
        with pytest.raises(StorageUnavailable, match="may have been made"):
            put(store, 2)
    try:
        # So far it has not been carried out, and what is in force is remembered.
        assert eventually(lambda: active_or_away(store) == 1 and store.resolve_remembered("acme", "task") is not None)
    finally:
        os.kill(hanging[0], signal.SIGCONT)
    assert eventually(lambda: store.get_task("acme", "task").active_version == 2)
    assert eventually(lambda: store.resolve("acme", "task").version == 2)


def test_store_is_closed_while_its_database_hangs(
    postgres: PostgresServer, url: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "STOP_TIMEOUT_S", 0.2)
    monkeypatch.setattr(postgresql, "CLOSE_TIMEOUT_S", 0.2)
    store = open_store(url)
    put(store, 1)
    # Nothing but `close` itself ends the waiting.
    database_of(store).availability._max_silence_s = 1000
    hanging = [int(pid) for pid in postgres.execute(BACKENDS).split()]
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    try:
        asking = threading.Thread(target=lambda: is_away(lambda: store.get_task("acme", "task")), daemon=True)
        asking.start()
        # Until the follower looks again, and so hangs too.
        time.sleep(2 * follower.POLL_INTERVAL_S)
        closing = threading.Thread(target=store.close, daemon=True)
        closing.start()
        closing.join(DEADLINE_S)
        asking.join(DEADLINE_S)
        assert not closing.is_alive()
        assert not asking.is_alive()
    finally:
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)


def test_replica_that_hangs_in_a_change_loses_it_and_the_others_go_on(
    url: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(postgresql, "IDLE_TIMEOUT_S", 0.3)
        hanging = open_store(url)
    other = open_store(url)
    begun, release, ended = threading.Event(), threading.Event(), []

    def hang() -> None:
        try:
            with hanging._database.changing("acme", "task"), hanging._database.writing() as session:
                session.execute(text("INSERT INTO quotas (tenant, updated_at) VALUES ('hung', now())"))
                begun.set()
                release.wait(DEADLINE_S)
                session.execute(text("SELECT 1"))
        except StorageFailed as error:
            ended.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    assert begun.wait(DEADLINE_S)
    # Waits for the lock until the database has had enough of the one that hangs.
    assert put(other, 1).version == 1
    release.set()
    thread.join()
    assert len(ended) == 1
    assert other.get_quota("hung") is None


def test_database_that_hangs_is_waited_for_no_longer_than_for_one_that_is_gone(
    postgres: PostgresServer, url: str, open_store: OpenStore
) -> None:
    store = open_store(url)
    known = put(store, 1)
    assert eventually(lambda: store.resolve("acme", "task") == store.resolve_remembered("acme", "task"))
    database = database_of(store)
    database.availability._max_silence_s = 1.0
    hanging = [int(pid) for pid in postgres.execute(BACKENDS).split()]
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    try:
        # Fails when its connection is cut, or is asked on another one.
        is_away(lambda: store.get_task("acme", "task"))
        assert store.resolve("acme", "task") == known
        # The server as a whole is well: what hung were connections, and new ones are made.
        assert eventually(lambda: not is_away(lambda: store.get_task("acme", "task")))
        assert put(store, 2).version == 2
        assert store.health().num_reconnects >= 1
    finally:
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)


def test_socket_that_took_the_number_of_a_closed_one_is_left_alone() -> None:
    sockets = OpenSockets()
    one, two = socket.socketpair()
    sockets.add(one.fileno())
    number = one.detach()
    reader, writer = socket.socketpair()
    os.dup2(reader.fileno(), number)
    assert sockets.shut_down() == 0
    writer.send(b"x")
    assert os.read(number, 1) == b"x"
    sockets.add(number)
    assert (sockets.shut_down(), sockets.shut_down()) == (1, 0)
    assert os.read(number, 1) == b""
    os.close(number)
    for each in (two, reader, writer):
        each.close()


def test_writer_does_not_wait_for_ever(url: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = open_store(url)
    monkeypatch.setattr(postgresql, "LOCK_TIMEOUT_S", 0.2)
    two = open_store(url)
    with one._database.changing(None, None):
        with pytest.raises(StorageFailed, match="nothing was changed") as refused:
            put(two, 1)
        assert not isinstance(refused.value, StorageUnavailable)
        with pytest.raises(TaskNotFound):
            two.resolve("acme", "task")
    assert put(two, 1).version == 1


def test_changes_that_wait_leave_connections_to_readers(url: str, open_store: OpenStore) -> None:
    one, two = open_store(url), open_store(url)
    put(one, 1)
    seeds = range(2, 2 + postgresql.POOL_SIZE)
    writers = [threading.Thread(target=put, args=(two, seed)) for seed in seeds]
    with one._database.changing(None, None):
        for writer in writers:
            writer.start()
        # As many as there are connections are under way, and wait for the one that makes a change.
        time.sleep(0.5)
        assert two.get_task("acme", "task").active_version == 1
    for writer in writers:
        writer.join()
    assert len(two.list_versions("acme", "task")) == 1 + len(writers)


def test_error_of_a_statement_tells_neither_client_nor_log_what_was_stored(
    url: str, open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(url)
    event.listen(store._database.engine, "before_cursor_execute", _break_inserts, retval=True)
    with pytest.raises(StorageFailed) as refused:
        store.set_quota(Quota(tenant="confidential-name"))
    told = f"{refused.value} {refused.value.__cause__} {caplog.text}"
    assert "confidential-name" not in told


def _break_inserts(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    return (statement.replace("INSERT INTO quotas", "INSERT INTO nowhere"), parameters)
