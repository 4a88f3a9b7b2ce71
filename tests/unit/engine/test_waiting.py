"""Whose turn it is: the order of waiting rows against a plain dictionary of balances and sorted lists."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.row import Row
from server.engine.waiting import MAX_ABSENT, PRIORITY_STEP, WaitingRows
from tests.unit.engine.scheduling import make_row

TENANTS = ("a", "b", "c")


class TurnsSchedule(RuleBasedStateMachine):
    """Rows come, are served and charged, and tenants come and go."""

    @initialize(quantum=st.integers(1, 40))
    def start(self, quantum: int) -> None:
        self.quantum = quantum
        self.waiting = WaitingRows(quantum)
        self.used = dict.fromkeys(TENANTS, 0)
        self.queues: dict[str, list[Row]] = {tenant: [] for tenant in TENANTS}
        self.next_serial = 1

    @rule(tenant=st.sampled_from(TENANTS), num_tokens=st.integers(1, 30), priority=st.integers(-2, 2))
    def add(self, tenant: str, num_tokens: int, priority: int) -> None:
        row = make_row(self.next_serial, tenant=tenant, num_tokens=num_tokens, priority=priority)
        self.next_serial += 1
        present = [self.used[name] for name in TENANTS if self.queues[name]]
        if not self.queues[tenant]:
            self.used[tenant] = max([self.used[tenant], *([min(present)] if present else [])])
        self.waiting.add(row)
        self.queues[tenant].append(row)
        self.queues[tenant].sort(key=lambda r: (r.request.priority, r.serial))

    @precondition(lambda self: any(self.queues.values()))
    @rule(num_more=st.integers(0, 30))
    def serve_the_first(self, num_more: int) -> None:
        first = next(iter(self.waiting))
        tenant = first.request.tenant
        assert first is self.queues[tenant].pop(0)
        least = min(self.used[name] for name in TENANTS if self.queues[name] or name == tenant)
        assert self.used[tenant] - least < self.quantum, "a tenant that has had less waits"
        self.waiting.remove(first)
        self.waiting.charge(tenant, first.num_uncomputed + num_more)
        self.used[tenant] += first.num_uncomputed + num_more

    @invariant()
    def every_row_is_listed_once_and_each_tenants_in_order(self) -> None:
        if not hasattr(self, "waiting"):
            return
        listed = list(self.waiting)
        assert len(listed) == len(self.waiting) == sum(map(len, self.queues.values()))
        for tenant, queue in self.queues.items():
            assert [row for row in listed if row.request.tenant == tenant] == queue
            assert self.waiting.num_rows_of(tenant) == len(queue)


TestTurnsSchedule = TurnsSchedule.TestCase
TestTurnsSchedule.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    quantum=st.integers(1, 64),
    costs=st.fixed_dictionaries({t: st.lists(st.integers(1, 50), min_size=20, max_size=20) for t in "ab"}),
)
def test_two_tenants_with_a_backlog_get_the_same_tokens_whatever_their_rows_cost(
    quantum: int, costs: dict[str, list[int]]
) -> None:
    waiting = WaitingRows(quantum)
    serial = 0
    for tenant, lengths in costs.items():
        for num_tokens in lengths:
            serial += 1
            waiting.add(make_row(serial, tenant=tenant, num_tokens=num_tokens))
    used = {"a": 0, "b": 0}
    while waiting.num_rows_of("a") and waiting.num_rows_of("b"):
        row = next(iter(waiting))
        waiting.remove(row)
        waiting.charge(row.request.tenant, row.num_uncomputed)
        used[row.request.tenant] += row.num_uncomputed
        assert abs(used["a"] - used["b"]) < quantum + 50


def test_who_was_away_has_no_claim_on_what_others_used() -> None:
    waiting = WaitingRows(1)
    for serial in range(1, 6):
        waiting.add(make_row(serial, tenant="a"))
    waiting.charge("a", 10_000)
    for serial in range(6, 9):
        waiting.add(make_row(serial, tenant="b"))
    assert [row.request.tenant for row in waiting] == ["a", "b", "a", "b", "a", "b", "a", "a"]


def test_going_away_pays_no_debt() -> None:
    waiting = WaitingRows(1)
    rows = [make_row(serial, tenant="a") for serial in (1, 2, 3)]
    for row in rows:
        waiting.add(row)
    debtor = make_row(4, tenant="b")
    waiting.add(debtor)
    waiting.remove(debtor)
    waiting.charge("b", 2)
    waiting.add(make_row(5, tenant="b"))
    assert [row.serial for row in waiting] == [1, 2, 3, 5]


def test_row_of_lower_priority_number_goes_first_but_overtakes_none_for_ever() -> None:
    waiting = WaitingRows()
    for serial, priority in ((1, 0), (2, 0), (3, -1), (PRIORITY_STEP + 2, -1)):
        waiting.add(make_row(serial, priority=priority))
    assert [row.serial for row in waiting] == [3, 1, 2, PRIORITY_STEP + 2]


def test_priority_of_one_tenant_is_nothing_to_another() -> None:
    waiting = WaitingRows(1)
    waiting.add(make_row(1, tenant="a"))
    waiting.add(make_row(2, tenant="b", priority=-5))
    assert [row.serial for row in waiting] == [1, 2]


@pytest.mark.parametrize("num_tenants", [MAX_ABSENT + 10])
def test_only_so_many_absent_tenants_are_remembered(num_tenants: int) -> None:
    waiting = WaitingRows()
    for serial in range(1, num_tenants + 1):
        row = make_row(serial, tenant=f"t{serial}")
        waiting.add(row)
        waiting.remove(row)
    assert len(waiting._balances) <= MAX_ABSENT + 1
