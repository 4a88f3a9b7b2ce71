"""Disk faults at the N-th call, for every N: a clear error, nothing registered, everything else undisturbed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from prompt_store.errors import PromptStoreError, StorageFailed, StorageFull
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import make_config, make_file, random_embeddings

CONFIG = make_config()
OTHER_CONFIG = make_config(num_layers=3)
CALLS = ("open", "write", "fsync", "rename")


@pytest.fixture
def store(folder_store: PromptStore) -> PromptStore:
    """Faults of a disk are a folder's alone."""
    return folder_store


class Fault:
    """Makes the N-th of the calls that change a disk fail, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None, code: int) -> None:
        self.num_calls = 0
        self.fired = False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), fail_at, code))

    def _wrap(self, real: Callable[..., Any], fail_at: int | None, code: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == fail_at:
                self.fired = True
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return call


def refusal_of(action: Callable[[], None]) -> PromptStoreError | None:
    try:
        action()
    except PromptStoreError as error:
        return error
    return None


def root_of(store: PromptStore) -> Path:
    assert store.root is not None
    return store.root


def upload_second(store: PromptStore) -> None:
    store.upload("t", "task", file=make_file(seed=2), config=OTHER_CONFIG)


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, StorageFailed)]
)
def test_fault_at_every_call_of_an_upload(store: PromptStore, code: int, error: type[PromptStoreError]) -> None:
    first, _ = store.upload("t", "task", file=make_file(seed=1), config=CONFIG)
    num_faults = 0
    while True:
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, num_faults + 1, code)
            refusal = refusal_of(lambda: upload_second(store))
        if not fault.fired:
            break
        num_faults += 1
        assert type(refusal) is error
        assert str(store.root) not in str(refusal)
        assert store.resolve("t", "task") == first
        np.testing.assert_array_equal(store.load(first).values, random_embeddings(1))
        store.check_invariants()
        assert not list((root_of(store) / "tmp").iterdir())
    assert num_faults >= 10
    assert store.resolve("t", "task").version == 2
    store.check_invariants()


def test_short_writes_are_completed(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
    version, _ = store.upload("t", "task", file=make_file(seed=2), config=CONFIG)
    assert store.read_file(version) == make_file(seed=2)


def test_full_database_is_told_as_full_and_changes_nothing(store: PromptStore) -> None:
    first, _ = store.upload("t", "task", file=make_file(seed=1), config=CONFIG)
    # Every new statement finds the database at its largest size: SQLite's own "database or disk is full".
    engine = store._database.engine

    def shrink(connection: Any) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count=1")

    event.listen(engine, "begin", shrink)
    large = {"x": "y" * 16_000}
    with pytest.raises(StorageFull):
        store.upload("t", "other", file=make_file(seed=2), config=CONFIG, metadata=large)
    event.remove(engine, "begin", shrink)
    engine.dispose()
    assert store.resolve("t", "task") == first
    store.check_invariants()
    upload_second(store)


def test_unreadable_file_is_a_storage_error_and_no_quarantine(
    store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = store.upload("t", "task", file=make_file(seed=1), config=CONFIG)

    def fail(*_args: Any) -> bytes:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", fail)
        with pytest.raises(StorageFailed):
            store.load(version)
    assert store.resolve("t", "task").state == "active"
    store.load(version)


def test_blob_that_cannot_be_removed_is_swept_later(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.upload("t", "task", file=make_file(seed=1), config=CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_args, **_options: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
        store.delete_task("t", "task")
    assert store.counts().num_versions == 0
    root = root_of(store)
    assert list(root.glob("blobs/*/*"))
    store.close()
    with PromptStore.open(root) as again:
        again.check_invariants()
        assert not list(root.glob("blobs/*/*"))


def test_damaged_database_is_a_clear_error(store: PromptStore) -> None:
    root = root_of(store)
    store.close()
    (root / "catalog.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageFailed):
        PromptStore.open(root)
    # The folder is not left locked.
    (root / "catalog.sqlite3").unlink()
    PromptStore.open(root).close()
