"""Keys, the audit log, totals, and the folder itself."""

import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from prompt_store.errors import (
    InvalidValue,
    KeyNotFound,
    StorageFailed,
    StoreInUse,
)
from prompt_store.location import Location
from prompt_store.models import Base
from prompt_store.shared_models import SharedBase
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import (
    BACKBONE,
    make_file,
    put,
)


def everything_in(store: PromptStore) -> str:
    if store.root is not None:
        return "".join(path.read_bytes().decode("latin-1") for path in store.root.rglob("*") if path.is_file())
    with store._database.engine.connect() as connection:
        tables = [*Base.metadata.sorted_tables, *SharedBase.metadata.sorted_tables]
        return "".join(str(connection.execute(select(table)).all()) for table in tables)


def test_second_server_on_a_folder_is_refused_and_key_management_beside_it_is_not(root: Path) -> None:
    with PromptStore.open(root, backbone=BACKBONE) as store:
        with pytest.raises(StoreInUse, match=str(os.getpid())):
            PromptStore.open(root)
        with PromptStore.open(root, exclusive=False) as beside:
            key, secret = beside.create_key("acme", {"infer", "write"}, "ci")
            assert store.verify_key(secret) == key
            beside.revoke_key(key.id)
        assert store.verify_key(secret) is None
    PromptStore.open(root).close()


def test_closed_store_says_so(location: Location) -> None:
    store = PromptStore.open(location, backbone=BACKBONE)
    store.close()
    store.close()
    with pytest.raises(StorageFailed, match="closed"):
        put(store, 1)


def test_key_is_known_by_its_secret_alone(store: PromptStore) -> None:
    assert not store.has_keys()
    key, secret = store.create_key("acme", ["infer", "admin", "infer"], "laptop", actor="root")
    assert secret.startswith("pm_")
    assert len(secret) > 40
    assert (key.tenant, key.scopes, key.label, key.revoked_at) == ("acme", {"infer", "admin"}, "laptop", None)
    assert store.verify_key(secret) == key
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), "pm_", "x" * 10_000, "\ud800"):
        assert store.verify_key(wrong) is None
    assert secret not in everything_in(store)


def test_revoked_key_proves_nothing_and_still_counts_as_made(store: PromptStore) -> None:
    key, secret = store.create_key("acme", {"infer"})
    revoked = store.revoke_key(key.id)
    assert revoked.revoked_at is not None
    assert store.revoke_key(key.id).revoked_at == revoked.revoked_at
    assert store.verify_key(secret) is None
    assert store.has_keys()
    assert store.list_keys() == [revoked]
    with pytest.raises(KeyNotFound):
        store.revoke_key("key_nope")


@pytest.mark.parametrize("scopes", [set(), {"root"}, {"infer", "x"}, "infer"])
def test_unknown_scopes_are_refused(store: PromptStore, scopes: set[str]) -> None:
    with pytest.raises(InvalidValue) as caught:
        store.create_key("acme", scopes)
    assert caught.value.param == "scopes"
    assert not store.has_keys()


def test_audit_tells_who_did_what_in_order(store: PromptStore) -> None:
    put(store, 1, created_by="ann")
    put(store, 2, created_by="ann")
    store.update_task("acme", "task", pinned=True, actor="bob")
    store.rollback("acme", "task", actor="bob")
    store.delete_version("acme", "task", 2, actor="bob")
    store.delete_task("acme", "task", actor="bob")
    put(store, 1, tenant="other")
    store.audit("acme", actor="ann", action="note", detail={"why": "because"})
    entries = list(store.iter_audit("acme"))
    actions = ["upload", "upload", "pin", "rollback", "delete_version", "delete_task", "note"]
    assert [entry.action for entry in entries] == actions
    assert [entry.actor for entry in entries[:3]] == ["ann", "ann", "bob"]
    assert entries[0].digest is not None
    assert list(store.iter_audit("acme", after=entries[-2].id)) == entries[-1:]
    assert len(list(store.iter_audit())) == len(entries) + 1


def test_counts_add_up(store: PromptStore) -> None:
    put(store, 1)
    put(store, 2)
    put(store, 1, tenant="other")
    store.create_key("acme", {"infer"})
    counts = store.counts()
    assert (counts.num_tasks, counts.num_versions, counts.num_keys) == (2, 3, 1)
    assert counts.num_bytes == 3 * len(make_file(seed=1))


def test_leftovers_are_swept_at_start(root: Path) -> None:
    with PromptStore.open(root, backbone=BACKBONE) as store:
        put(store, 1)
    orphan = root / "blobs" / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x")
    (root / "tmp" / "half").write_bytes(b"x")
    with PromptStore.open(root, exclusive=False):
        assert orphan.exists()
    with PromptStore.open(root, backbone=BACKBONE) as store:
        assert not orphan.exists()
        assert not list((root / "tmp").iterdir())
        store.check_invariants()


def test_files_are_for_their_owner_alone(folder_store: PromptStore, root: Path) -> None:
    put(folder_store, 1)
    for path in [root, *root.glob("blobs/**/*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
