"""Quotas, receipts, and what a tenant can see."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event

from prompt_store.errors import InvalidName, InvalidValue, QuotaExceeded, TaskNotFound
from prompt_store.manifest import Quota, Receipt
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import K, put

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_receipt(request_id: str, tenant: str = "acme", task: str | None = "task") -> Receipt:
    return Receipt(
        at=NOW,
        request_id=request_id,
        tenant=tenant,
        key_id="key_1",
        endpoint="/v1/completions",
        owner=None if task is None else tenant,
        task=task,
        version=None if task is None else 3,
        digest=None if task is None else "d" * 64,
        num_rows=2,
        prompt_tokens=5,
        completion_tokens=7,
        outcome="length,stop",
    )


def ids(store: PromptStore, **filters: Any) -> list[str]:
    return [receipt.request_id for receipt in store.iter_receipts(filters.pop("tenant", None), **filters)]


def count_queries(store: PromptStore, call: Callable[[], object]) -> int:
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        # A lock is taken by a statement of the same kind, and reads nothing.
        if statement.startswith("SELECT") and "pg_advisory" not in statement:
            statements.append(statement)

    event.listen(store._database.engine, "before_cursor_execute", note)
    try:
        call()
    finally:
        event.remove(store._database.engine, "before_cursor_execute", note)
    return len(statements)


def test_quota_is_what_was_set_last(store: PromptStore) -> None:
    assert store.get_quota("acme") is None
    store.set_quota(Quota(tenant="acme", max_prompts=3, tokens_per_minute=10**12), actor="key_1")
    stored = store.set_quota(Quota(tenant="acme", max_prompts=5))
    store.set_quota(Quota(tenant="zeta"))
    assert store.get_quota("acme") == stored
    assert (stored.max_prompts, stored.tokens_per_minute) == (5, None)
    assert [quota.tenant for quota in store.list_quotas()] == ["acme", "zeta"]
    first = next(iter(store.iter_audit("acme")))
    assert (first.action, first.actor, first.detail["max_prompts"]) == ("set_quota", "key_1", 3)


@pytest.mark.parametrize(
    ("quota", "error"),
    [(Quota(tenant="Not A Name"), InvalidName), (Quota(tenant="t", max_prompts=-1), InvalidValue)],
)
def test_wrong_quota_is_refused(store: PromptStore, quota: Quota, error: type[Exception]) -> None:
    with pytest.raises(error):
        store.set_quota(quota)
    assert store.list_quotas() == []


@pytest.mark.parametrize(
    ("quota", "param"),
    [
        (Quota(tenant="acme", max_prompts=2), "max_prompts"),
        (Quota(tenant="acme", max_virtual_tokens=2 * K), "max_virtual_tokens"),
        (Quota(tenant="acme", max_prompt_bytes=2200), "max_prompt_bytes"),
    ],
)
def test_upload_beyond_the_quota_is_refused_and_leaves_nothing(store: PromptStore, quota: Quota, param: str) -> None:
    put(store, 1, quota=quota)
    second = put(store, 2, task="other", quota=quota)
    for task in ("task", "third"):
        with pytest.raises(QuotaExceeded) as refused:
            put(store, 3, task=task, quota=quota)
        assert refused.value.param == param
    store.check_invariants()
    assert put(store, 2, task="other", quota=quota) == second, "the same bytes again are nothing more"
    put(store, 3, tenant="elsewhere")
    store.update_task("acme", "task", pinned=True)
    store.delete_task("acme", "other")
    put(store, 3, quota=quota)


def test_receipts_come_back_as_they_went_in(store: PromptStore) -> None:
    written = [make_receipt("one"), make_receipt("two", task=None)]
    store.append_receipts(written, max_rows=10)
    store.append_receipts([], max_rows=10)
    found = list(store.iter_receipts())
    assert [receipt.id for receipt in found] == [1, 2]
    assert [make_receipt(receipt.request_id, task=receipt.task) for receipt in found] == written


def test_receipts_are_found_by_tenant_task_request_and_cursor(store: PromptStore) -> None:
    store.append_receipts(
        [make_receipt("a"), make_receipt("b", tenant="zeta"), make_receipt("c", task="other"), make_receipt("a")],
        max_rows=10,
    )
    assert ids(store) == ["a", "b", "c", "a"]
    assert ids(store, tenant="acme") == ["a", "c", "a"]
    assert ids(store, tenant="acme", task="task") == ["a", "a"]
    assert ids(store, request_id="a", after=1) == ["a"]
    assert ids(store, after=4) == []


def test_oldest_receipts_give_way(store: PromptStore) -> None:
    for number in range(7):
        store.append_receipts([make_receipt(f"{number}-{part}") for part in range(2)], max_rows=5)
    assert ids(store) == ["4-1", "5-0", "5-1", "6-0", "6-1"]


def test_receipts_make_nothing_be_resolved_anew(store: PromptStore) -> None:
    put(store, 1)
    store._cache._poll_interval_s = 0.0
    store.resolve("acme", "task")

    def work() -> None:
        for number in range(5):
            store.append_receipts([make_receipt(str(number))], max_rows=100)
            store.resolve("acme", "task")

    # One a transaction, for the newest id; none to resolve.
    assert count_queries(store, work) == 5


def test_tenant_sees_its_own_tasks_and_shared_ones_that_it_never_had(store: PromptStore) -> None:
    for name in ("a", "b", "c", "d"):
        put(store, 1, task=name, tenant="shared")
    put(store, 2, task="b")
    put(store, 3, task="c")
    store.delete_task("acme", "c")
    put(store, 4, task="e", activate=False)

    def seen(tenant: str, **page: Any) -> list[tuple[str, str]]:
        return [(task.task, task.tenant) for task, _ in store.list_visible(tenant, **page)]

    everything = [("a", "shared"), ("b", "acme"), ("d", "shared"), ("e", "acme")]
    assert seen("acme") == everything
    paged = seen("acme", limit=1)
    while page := seen("acme", limit=1, after=paged[-1][0]):
        paged += page
    assert paged == everything
    assert [task.task for task in store.list_callable("acme")] == ["a", "b", "d"]
    assert [version.version if version else None for _, version in store.list_visible("acme")] == [1, 1, 1, None]
    assert [name for name, _ in seen("shared")] == ["a", "b", "c", "d"]
    for name, owner in everything:
        assert store.get_visible("acme", name)[0].tenant == owner
    with pytest.raises(TaskNotFound):
        store.get_visible("acme", "c")


def test_page_of_tasks_takes_as_many_queries_however_many_there_are(store: PromptStore) -> None:
    put(store, 1, task="t0")
    few = count_queries(store, lambda: store.list_visible("acme"))
    for number in range(1, 12):
        put(store, 1, task=f"t{number}")
        put(store, 1, task=f"s{number}", tenant="shared")
    assert count_queries(store, lambda: store.list_visible("acme")) == few == 2
