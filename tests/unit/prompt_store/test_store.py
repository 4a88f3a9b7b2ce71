"""Versions and tasks: uploaded, resolved, activated, rolled back, deleted, damaged."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from sqlalchemy import event, func, select

from prompt_store.errors import (
    PromptCorrupt,
    TaskNotFound,
    VersionActive,
    VersionConflict,
)
from prompt_store.location import Location
from prompt_store.models import VersionRow
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import (
    BACKBONE,
    CONFIG,
    flip_bit,
    make_file,
    num_blobs,
    put,
    random_embeddings,
    tamper,
)


def test_upload_is_found_again_with_its_bytes_and_numbers(store: PromptStore) -> None:
    file = make_file(seed=1)
    version, created = store.upload(
        "acme", "task", file=file, config=CONFIG, metadata={"labels": ["a", "ü"]}, created_by="key_1"
    )
    assert created
    assert (version.version, version.state, version.num_bytes, version.created_by) == (1, "active", len(file), "key_1")
    assert version.created_at.utcoffset() is not None
    found = store.resolve("acme", "task")
    assert found == version
    assert found.metadata == {"labels": ["a", "ü"]}
    assert (store.read_file(found), store.read_config(found)) == (file, CONFIG)
    np.testing.assert_array_equal(store.load(found).values, random_embeddings(1))
    store.check_invariants()


def test_reopened_store_has_everything(location: Location) -> None:
    with PromptStore.open(location, backbone=BACKBONE) as store:
        first, second = put(store, 1), put(store, 2, activate=False)
        key, secret = store.create_key("acme", {"infer"}, "laptop")
    with PromptStore.open(location, backbone=BACKBONE) as store:
        assert store.resolve("acme", "task") == first
        assert store.get_version("acme", "task", 2) == second
        assert store.verify_key(secret) == key
        store.check_invariants()


def test_same_file_again_is_the_version_it_already_is(store: PromptStore) -> None:
    first = put(store, 1)
    again, created = store.upload("acme", "task", file=make_file(seed=1), config=CONFIG)
    assert (again, created) == (first, False)
    put(store, 2)
    again, created = store.upload("acme", "task", file=make_file(seed=1), config=CONFIG, activate=False)
    assert (again.version, again.state, created) == (1, "inactive", False)
    again, created = store.upload("acme", "task", file=make_file(seed=1), config=CONFIG)
    assert (again.version, again.state, created) == (1, "active", False)
    assert store.get_task("acme", "task").num_versions == 2


def test_repeated_upload_succeeds_although_its_expected_version_has_passed(store: PromptStore) -> None:
    put(store, 1)
    second = put(store, 2, expected_version=1)
    assert put(store, 2, expected_version=1) == second
    with pytest.raises(VersionConflict):
        put(store, 1, expected_version=1)


def test_expected_version_is_compared_and_swapped(store: PromptStore) -> None:
    with pytest.raises(VersionConflict, match="does not exist"):
        put(store, 1, expected_version=1)
    put(store, 1, expected_version=0)
    with pytest.raises(VersionConflict, match="exists"):
        put(store, 2, expected_version=0)
    put(store, 2, expected_version=1)
    with pytest.raises(VersionConflict, match="version 2 is active") as caught:
        put(store, 3, expected_version=1)
    assert caught.value.param == "expected_version"
    with pytest.raises(VersionConflict):
        store.update_task("acme", "task", active_version=1, expected_version=1)
    assert store.get_task("acme", "task").num_versions == 2
    store.check_invariants()


def test_two_writers_of_one_task_one_wins(store: PromptStore) -> None:
    put(store, 0)
    for round_number in range(1, 6):
        expected = store.get_task("acme", "task").active_version
        barrier, outcomes = threading.Barrier(2), []

        def write(seed: int, expected: int | None = expected, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                outcomes.append(put(store, seed, expected_version=expected))  # noqa: B023
            except VersionConflict:
                outcomes.append(None)  # noqa: B023

        threads = [threading.Thread(target=write, args=(100 * round_number + side,)) for side in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(None) == 1
        winner = next(outcome for outcome in outcomes if outcome is not None)
        assert store.resolve("acme", "task") == winner
    store.check_invariants()


def test_resolve_by_version_and_digest(store: PromptStore) -> None:
    first, second = put(store, 1), put(store, 2)
    assert store.resolve("acme", "task") == second
    assert store.resolve("acme", "task@1").digest == first.digest
    assert store.resolve("acme", f"task@sha256:{first.digest}").version == 1


@pytest.mark.parametrize(
    "reference",
    [
        *[
            "nope",
            "task@9",
            "task@0",
            "task@01",
            "task@-1",
            "task@",
            "task@9999999999999999999",
            "task@sha256:" + "0" * 64,
        ],
        *["task@sha256:zz", "task@sha1:00", "Task", "", "..", "a" * 100_000, "task\n", "täsk", "\ud800", "@1"],
    ],
)
def test_unknown_foreign_and_malformed_references_get_one_message(store: PromptStore, reference: str) -> None:
    put(store, 1)
    put(store, 1, task="hidden", tenant="other")
    with pytest.raises(TaskNotFound) as unknown:
        store.resolve("acme", reference)
    with pytest.raises(TaskNotFound) as foreign:
        store.resolve("acme", "hidden")
    shown = unknown.value.message.split("`")[1]
    assert unknown.value.message.replace(shown, "") == foreign.value.message.replace("hidden", "")
    assert len(unknown.value.message.encode()) < 400


def test_shared_tasks_are_seen_unless_an_own_name_shadows_them(store: PromptStore) -> None:
    shared = put(store, 1, tenant="shared")
    assert store.resolve("acme", "task") == shared
    own = put(store, 2)
    assert store.resolve("acme", "task") == own
    assert store.resolve("other", "task") == shared
    store.delete_task("acme", "task")
    with pytest.raises(TaskNotFound):
        store.resolve("acme", "task")


def test_staged_version_does_not_answer_until_it_is_activated(store: PromptStore) -> None:
    put(store, 1, activate=False)
    with pytest.raises(TaskNotFound):
        store.resolve("acme", "task")
    assert store.resolve("acme", "task@1").state == "inactive"
    store.update_task("acme", "task", active_version=1)
    assert store.resolve("acme", "task").version == 1


def test_rollback_goes_back_one_activation_a_call(store: PromptStore) -> None:
    for seed in (1, 2, 3):
        put(store, seed)
    assert [store.rollback("acme", "task").active_version for _ in range(2)] == [2, 1]
    with pytest.raises(VersionConflict):
        store.rollback("acme", "task")
    assert store.rollback("acme", "task", to=3).active_version == 3
    assert store.rollback("acme", "task").active_version == 1
    assert store.resolve("acme", "task").version == 1


def test_rollback_passes_over_deleted_and_quarantined_versions(store: PromptStore) -> None:
    versions = [put(store, seed) for seed in (1, 2, 3, 4)]
    store.delete_version("acme", "task", 3)
    tamper(store, versions[1].digest, flip_bit)
    with pytest.raises(PromptCorrupt):
        store.load(versions[1])
    assert store.rollback("acme", "task").active_version == 1


def test_active_version_is_not_deleted(store: PromptStore) -> None:
    put(store, 1)
    with pytest.raises(VersionActive):
        store.delete_version("acme", "task", 1)
    assert store.resolve("acme", "task").version == 1


def test_deleted_version_is_gone_and_its_number_is_not_used_again(store: PromptStore) -> None:
    put(store, 1)
    second = put(store, 2, activate=False)
    store.delete_version("acme", "task", 2)
    with pytest.raises(TaskNotFound):
        store.get_version("acme", "task", 2)
    with pytest.raises(TaskNotFound):
        store.load(second)
    assert not store._blobs.exists(second.digest)
    assert put(store, 2).version == 3
    store.check_invariants()


def test_blob_stays_while_another_task_refers_to_it(store: PromptStore) -> None:
    version = put(store, 1)
    put(store, 1, tenant="other")
    store.delete_task("acme", "task")
    assert store._blobs.exists(version.digest)
    store.load(store.resolve("other", "task"))
    store.delete_task("other", "task")
    store.check_invariants()
    assert num_blobs(store) == 0


def test_deleted_name_stays_retired_in_its_tenant_alone(store: PromptStore) -> None:
    put(store, 1)
    store.delete_task("acme", "task")
    with pytest.raises(VersionConflict, match="retired"):
        put(store, 1)
    for refused in (store.get_task, store.delete_task, store.rollback, store.list_versions):
        with pytest.raises(TaskNotFound):
            refused("acme", "task")
    assert store.list_tasks("acme") == []
    assert put(store, 1, tenant="other").version == 1


def test_pin_and_activation_change_together_or_not_at_all(store: PromptStore) -> None:
    put(store, 1)
    with pytest.raises(TaskNotFound):
        store.update_task("acme", "task", active_version=9, pinned=True)
    assert not store.get_task("acme", "task").pinned
    put(store, 2, activate=False)
    task = store.update_task("acme", "task", active_version=2, expected_version=1, pinned=True)
    assert (task.active_version, task.pinned) == (2, True)
    assert [version.version for version in store.pinned_versions()] == [2]


def test_lists_are_paged_and_keep_to_their_tenant(store: PromptStore) -> None:
    for index in range(5):
        put(store, index, task=f"task-{index}")
    put(store, 9, tenant="other")
    first = store.list_tasks("acme", limit=3)
    rest = store.list_tasks("acme", limit=3, after=first[-1].task)
    assert [task.task for task in first + rest] == [f"task-{index}" for index in range(5)]
    for seed in (11, 12, 13):
        put(store, seed, task="task-0")
    newest = store.list_versions("acme", "task-0", limit=2)
    oldest = store.list_versions("acme", "task-0", limit=5, after=newest[-1].version)
    assert [version.version for version in newest + oldest] == [4, 3, 2, 1]
    assert [version.state for version in newest + oldest] == ["active", "inactive", "inactive", "inactive"]


def test_flipped_bit_is_refused_quarantined_and_repaired_by_uploading_again(store: PromptStore) -> None:
    put(store, 2)
    version = put(store, 1)
    tamper(store, version.digest, flip_bit)
    with pytest.raises(PromptCorrupt, match="digest"):
        store.load(version)
    assert store.resolve("acme", "task").state == "quarantined"
    tamper(store, version.digest, lambda _: make_file(seed=1))
    for refused in (store.load, store.read_file, store.read_config):
        with pytest.raises(PromptCorrupt, match="quarantined"):
            refused(version)
    store.rollback("acme", "task")
    with pytest.raises(PromptCorrupt):
        store.update_task("acme", "task", active_version=version.version)
    tamper(store, version.digest, flip_bit)
    repaired, created = store.upload("acme", "task", file=make_file(seed=1), config=CONFIG)
    assert (repaired.version, repaired.state, created) == (version.version, "active", False)
    np.testing.assert_array_equal(store.load(repaired).values, random_embeddings(1))
    store.check_invariants()


@pytest.mark.parametrize("damage", [flip_bit, lambda _: None, lambda _: b""])
def test_damaged_config_is_refused_too(store: PromptStore, damage: Callable[[bytes], bytes | None]) -> None:
    version = put(store, 1)
    for digest in list(store._blobs.digests()):
        if digest != version.digest:
            tamper(store, digest, damage)
    with pytest.raises(PromptCorrupt):
        store.load(version)
    assert store.get_version("acme", "task", 1).state == "quarantined"


def test_resolving_a_known_reference_takes_microseconds(store: PromptStore) -> None:
    put(store, 1)
    store.resolve("acme", "task")
    started = time.perf_counter()
    for _ in range(1000):
        store.resolve("acme", "task")
    assert (time.perf_counter() - started) / 1000 < 100e-6


def test_readers_never_see_a_version_older_than_a_finished_write(store: PromptStore) -> None:
    put(store, 0)
    finished, stop, failures = [1], threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            least = finished[0]
            found = store.resolve("acme", "task").version
            if found < least:
                failures.append((found, least))

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(1, 10):
        finished[0] = put(store, seed).version
    stop.set()
    reader.join()
    assert failures == []


def test_prefix_key_is_a_tenants_as_long_as_one_of_its_versions_has_it(store: PromptStore) -> None:
    key = put(store, seed=1, task="one").prefix_key
    assert put(store, seed=1, task="two").prefix_key == key
    put(store, seed=1, task="one", tenant="other")
    store.delete_task("acme", "one")
    assert store.has_prefix("acme", key)
    store.delete_task("acme", "two")
    assert not store.has_prefix("acme", key)
    assert store.has_prefix("other", key)


def test_what_is_asked_after_each_upload_walks_through_no_table(folder_store: PromptStore) -> None:
    store = folder_store
    asked: list[tuple[str, tuple[object, ...]]] = []
    event.listen(
        store._database.engine, "before_cursor_execute", lambda *arguments: asked.append((arguments[2], arguments[3]))
    )
    put(store, 1)
    asked.clear()

    assert store.pinned_versions() == []
    assert store.pins() == frozenset()
    assert store.num_versions() == 1

    selects = [(statement, values) for statement, values in asked if statement.startswith("SELECT")]
    assert len(selects) == 3
    with store._database.engine.connect() as connection:
        for statement, values in selects:
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]
            # SQLite counts the rows of an index page by page.
            assert all("SCAN" not in step or "COVERING INDEX" in step for step in plan), plan


def test_reads_of_one_session_are_of_one_moment(store: PromptStore) -> None:
    put(store, 1)
    count = select(func.count()).select_from(VersionRow)
    with store._database.reading() as session:
        assert session.scalar(count) == 1
        put(store, 2)
        assert session.scalar(count) == 1
    assert store.num_versions() == 2
