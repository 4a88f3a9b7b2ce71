"""A store moved to PostgreSQL and back: all of it, verified, or nothing."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from prompt_store import postgresql
from prompt_store import transfer as transfer_module
from prompt_store.database_blobs import DatabaseBlobs
from prompt_store.errors import InvalidValue, PromptCorrupt, StorageFailed, StoreInUse, VersionConflict
from prompt_store.location import Location
from prompt_store.manifest import Canary, Quota, Receipt
from prompt_store.models import Base
from prompt_store.shared_models import BlobRow
from prompt_store.store import PromptStore
from prompt_store.transfer import transfer
from tests.unit.prompt_store.conftest import OpenStore
from tests.unit.prompt_store.prompt_files import BACKBONE, flip_bit, make_file, num_blobs, put, tamper

PROBES = b'{"prompt": "x", "completion": "y"}'


def fill(location: Location) -> str:
    """Something in every table that a store has of its own; returns a key's secret."""
    with PromptStore.open(location, backbone=BACKBONE) as store:
        put(store, 1, metadata={"labels": ["ä", 1.5, None]})
        put(store, 2)
        put(store, 3, probes=PROBES, gate_threshold=0.5)
        store.set_gate("acme", "task", 3, status="passed", score=1.0, detail={"num_passed": 1})
        store.update_task("acme", "task", canary=Canary(1, 20), pinned=True)
        put(store, 4, task="gone")
        store.delete_task("acme", "gone")
        store.set_quota(Quota(tenant="acme", max_prompts=10**12))
        _, secret = store.create_key("acme", {"infer", "write"}, "laptop")
        receipt = Receipt(
            at=datetime.now(UTC),
            request_id="r",
            tenant="acme",
            key_id=None,
            endpoint="/v1/completions",
            owner=None,
            task=None,
            version=None,
            digest=None,
            num_rows=1,
            prompt_tokens=2,
            completion_tokens=3,
            outcome="stop",
        )
        store.append_receipts([receipt] * 1100, max_rows=10_000)
        store.add_training_file("acme", b'{"prompt": "a"}', filename="a.jsonl", num_examples=1)
        return secret


def contents(store: PromptStore) -> dict[str, list[dict[str, Any]]]:
    with store._database.reading() as session:
        return {
            table.name: [dict(row) for row in session.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in Base.metadata.sorted_tables
        }


def test_everything_arrives_and_comes_back(root: Path, url: str, tmp_path: Path, open_store: OpenStore) -> None:
    secret = fill(root)
    there = transfer(root, url)
    back = transfer(url, tmp_path / "back")
    assert there == back
    assert (there.num_rows["versions"], there.num_rows["receipts"], there.damaged) == (3, 1100, ())
    stores = [open_store(location) for location in (root, url, tmp_path / "back")]
    first = contents(stores[0])
    assert all(first[name] for name in ("tasks", "versions", "activations", "keys", "audit", "quotas", "receipts"))
    for store in stores:
        assert contents(store) == first
        store.check_invariants()
        assert num_blobs(store) == there.num_blobs
        assert store.read_file(store.resolve("acme", "task")) == make_file(seed=3)
        assert store.verify_key(secret) is not None
        # Ids and numbers go on where they were.
        assert put(store, 9).version == 4
        assert store.rollback("acme", "task").active_version == 3
        with pytest.raises(VersionConflict, match="retired"):
            put(store, 1, task="gone")


def test_place_that_is_not_empty_is_refused_and_left_alone(root: Path, url: str) -> None:
    fill(root)
    with PromptStore.open(url, backbone=BACKBONE) as store:
        store.create_key("zeta", {"infer"})
        before = contents(store)
        with pytest.raises(InvalidValue, match="not empty") as refused:
            transfer(root, url)
        assert refused.value.param == "to"
        assert contents(store) == before


def test_place_itself_is_no_target(root: Path) -> None:
    fill(root)
    with pytest.raises(InvalidValue):
        transfer(root, root)


def test_folder_that_is_being_served_is_not_moved(root: Path, url: str) -> None:
    fill(root)
    with PromptStore.open(root, backbone=BACKBONE), pytest.raises(StoreInUse):
        transfer(root, url)


@pytest.mark.parametrize("direction", ["there", "back"])
def test_interrupted_copy_leaves_an_empty_place_to_which_it_can_be_repeated(
    root: Path, url: str, tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root)
    source: Location = root
    target: Location = url
    if direction == "back":
        transfer(root, url)
        source, target = url, tmp_path / "back"
    real: Callable[..., Any] = transfer_module._copy_table

    def fail_at_receipts(table: Any, *arguments: Any) -> Any:
        if table.name == "receipts":
            raise OSError("the cable was pulled")
        return real(table, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "_copy_table", fail_at_receipts)
        with pytest.raises(StorageFailed):
            transfer(source, target)
    with PromptStore.open(target, backbone=BACKBONE) as store:
        assert not any(contents(store).values())
        # What a folder had taken already is swept.
        assert num_blobs(store) == 0
    assert transfer(source, target).num_rows["receipts"] == 1100


@pytest.mark.parametrize("direction", ["there", "back"])
def test_side_that_has_to_wait_for_the_other_keeps_its_transaction(
    root: Path, url: str, tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PromptStore.open(root, backbone=BACKBONE) as store:
        put(store, 1)
    source: Location = root
    target: Location = url
    if direction == "back":
        transfer(root, url)
        source, target = url, tmp_path / "back"
    monkeypatch.setattr(postgresql, "IDLE_TIMEOUT_S", 0.4)
    waited = []

    def wait(what: str, done: int, total: int) -> None:
        if not waited:
            waited.append(what)
            time.sleep(1.0)

    assert transfer(source, target, progress=wait).num_rows["versions"] == 1


def test_rows_that_are_not_the_same_when_read_back_end_the_copy(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root)
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "_digest_of", lambda table, session: b"other")
        with pytest.raises(StorageFailed, match="not the same"):
            transfer(root, url)
    transfer(root, url)


def test_bytes_that_are_not_the_same_when_read_back_end_the_copy(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root)
    real = DatabaseBlobs.put

    def put_damaged(blobs: DatabaseBlobs, data: bytes) -> str:
        digest = real(blobs, data)
        with blobs._database.writing() as session:
            session.execute(update(BlobRow).where(BlobRow.digest == digest).values(data=flip_bit(data)))
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseBlobs, "put", put_damaged)
        with pytest.raises(PromptCorrupt):
            transfer(root, url)
    transfer(root, url)


def test_damaged_bytes_end_the_copy_unless_their_versions_are_quarantined_already(root: Path, url: str) -> None:
    with PromptStore.open(root, backbone=BACKBONE) as store:
        put(store, 1)
        damaged = put(store, 2)
        tamper(store, damaged.digest, flip_bit)
    with pytest.raises(PromptCorrupt):
        transfer(root, url)
    with PromptStore.open(root, backbone=BACKBONE) as store, pytest.raises(PromptCorrupt):
        store.load(damaged)
    assert transfer(root, url).damaged == (damaged.digest,)
    with PromptStore.open(url, backbone=BACKBONE) as store:
        assert store.get_version("acme", "task", 2).state == "quarantined"
        repaired, created = store.upload(
            "acme", "task", file=make_file(seed=2), config=store.read_config(store.get_version("acme", "task", 1))
        )
        assert (repaired.version, created) == (2, False)
        store.load(repaired)
        store.check_invariants()
