"""Who runs next, and with how many tokens: random schedules against the rules, and the rules one by one."""

from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.request import RowRequest, SamplingParams
from server.engine.row import Row, RowState
from server.engine.scheduler import Admission, ScheduledRow, Scheduler, WaitingRows
from server.engine.slots import Slot
from server.engine.text import TextStream

TENANTS = ("a", "b", "c")


class NoTokenizer:
    """The scheduler reads no text."""

    def decode(self, token_ids: object, *, skip_special_tokens: bool = False, **kwargs: object) -> str:
        raise AssertionError("the scheduler decoded a token")


def make_row(serial: int, *, tenant: str = "a", num_tokens: int = 1) -> Row:
    request = RowRequest(
        row_id=f"row-{serial}",
        tenant=tenant,
        token_ids=(1,) * num_tokens,
        prompt=None,
        sampling=SamplingParams(max_tokens=50),
    )
    text = TextStream(NoTokenizer(), context=request.token_ids, stop=(), skip_special_tokens=True)
    return Row(request=request, serial=serial, arrived_at_s=0.0, text=text)


class Admitter:
    """Stands for the engine's memory and prefixes: `num_slots` rows fit, `not_ready` wait for their prefix."""

    def __init__(self, num_slots: int = 1000) -> None:
        self.num_slots = num_slots
        self.num_used = 0
        self.not_ready: set[int] = set()
        self.asked: list[int] = []

    def __call__(self, row: Row) -> Admission:
        self.asked.append(row.serial)
        if row.serial in self.not_ready:
            return Admission.PREFIX_NOT_READY
        if self.num_used >= self.num_slots:
            return Admission.NO_ROOM
        self.num_used += 1
        row.slot = Slot(1, row.serial, 10_000, row.serial, row.serial)
        return Admission.ADMITTED


def make_scheduler(
    admitter: Admitter,
    *,
    max_rows: int = 8,
    max_step_tokens: int = 100,
    prefill_chunk: int = 50,
    max_cold_prompts: int | None = None,
) -> Scheduler:
    return Scheduler(
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        prefill_chunk=prefill_chunk,
        try_admit=admitter,
        max_cold_prompts=max_cold_prompts,
    )


def take(scheduled: list[ScheduledRow]) -> None:
    """Do what a step does to the rows: compute their tokens, and give a new one to those that reach their end."""
    for item in scheduled:
        yields_token = item.yields_token
        item.row.num_computed += item.num_tokens
        if yields_token:
            item.row.token_ids.append(2)


def end(scheduler: Scheduler, row: Row) -> None:
    row.slot = None
    scheduler.remove(row)


def serials(scheduled: list[ScheduledRow]) -> list[int]:
    return [item.row.serial for item in scheduled]


class Schedule(RuleBasedStateMachine):
    """Rows come, run and go in any order, with memory and prefixes that come and go."""

    @initialize(
        max_rows=st.integers(1, 6),
        spare=st.integers(0, 20),
        chunk=st.integers(1, 12),
        num_slots=st.integers(1, 6),
        max_cold=st.integers(1, 8),
    )
    def start(self, max_rows: int, spare: int, chunk: int, num_slots: int, max_cold: int) -> None:
        self.max_rows, self.budget, self.chunk, self.max_cold = max_rows, max_rows + spare, chunk, max_cold
        self.admitter = Admitter(num_slots)
        self.scheduler = make_scheduler(
            self.admitter,
            max_rows=max_rows,
            max_step_tokens=self.budget,
            prefill_chunk=chunk,
            max_cold_prompts=max_cold,
        )
        self.rows: dict[int, Row] = {}
        self.next_serial = 1

    @rule(tenant=st.sampled_from(TENANTS), num_tokens=st.integers(1, 30), is_ready=st.booleans())
    def submit(self, tenant: str, num_tokens: int, is_ready: bool) -> None:
        row = make_row(self.next_serial, tenant=tenant, num_tokens=num_tokens)
        self.next_serial += 1
        if not is_ready:
            self.admitter.not_ready.add(row.serial)
        self.rows[row.serial] = row
        self.scheduler.add(row)

    @rule()
    def prefixes_arrive(self) -> None:
        self.admitter.not_ready.clear()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def row_ends(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.rows)))
        row = self.rows.pop(serial)
        self.admitter.num_used -= row.slot is not None
        end(self.scheduler, row)
        assert row.state is RowState.FINISHED

    @rule()
    def step(self) -> None:
        running = list(self.scheduler.running)
        order = list(self.scheduler.waiting)
        self.admitter.asked.clear()
        scheduled = self.scheduler.schedule()
        tokens_of = {item.row.serial: item.num_tokens for item in scheduled}
        assert len(tokens_of) == len(scheduled), "a row is scheduled twice in a step"
        assert sum(tokens_of.values()) <= self.budget
        assert all(1 <= item.num_tokens <= min(self.chunk, item.row.num_uncomputed) for item in scheduled)
        # Running rows keep their place; those that decode take part in every step, and the oldest that prefills does.
        assert self.scheduler.running[: len(running)] == running
        assert all(row.serial in tokens_of for row in running if row.num_uncomputed == 1)
        prefilling = [row for row in running if row.num_uncomputed > 1]
        assert not prefilling or prefilling[0].serial in tokens_of
        # Admissions are asked for in order, and only the last answer may have been that there is no room.
        asked = self.admitter.asked
        assert asked == [row.serial for row in order[: len(asked)]]
        assert sum(serial in self.admitter.not_ready for serial in asked) <= self.max_cold
        admitted = self.scheduler.running[len(running) :]
        assert all(row.serial in tokens_of for row in admitted)
        refused = [s for s in asked if s not in {row.serial for row in admitted}]
        assert all(s in self.admitter.not_ready for s in refused if s != asked[-1])
        if not admitted and not running and order:
            cold = [index for index, row in enumerate(order) if row.serial in self.admitter.not_ready]
            reached = order[: cold[self.max_cold - 1]] if len(cold) >= self.max_cold else order
            ready = [row for row in reached if row.serial not in self.admitter.not_ready]
            assert not ready, "nothing runs although a row could"
        take(scheduled)

    @invariant()
    def rows_are_where_they_should_be(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        assert len(self.scheduler.running) <= self.max_rows
        assert len(self.scheduler.waiting) == len(list(self.scheduler.waiting))
        listed = [row.serial for row in (*self.scheduler.running, *self.scheduler.waiting)]
        assert sorted(listed) == sorted(self.rows)
        assert self.admitter.num_used == len(self.scheduler.running)

    def teardown(self) -> None:
        """Whatever the state: every row that is there is computed to its end in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        self.admitter.not_ready.clear()
        bound = 2 + sum(row.num_uncomputed for row in self.rows.values())
        for _ in range(bound):
            take(self.scheduler.schedule())
            for serial, row in list(self.rows.items()):
                if row.num_generated:
                    self.admitter.num_used -= 1
                    end(self.scheduler, self.rows.pop(serial))
        assert not self.rows, "a row starved"


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TurnsSchedule(RuleBasedStateMachine):
    """The order of waiting rows against a plain queue of tenants, each with a queue of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = WaitingRows()
        self.turns: deque[tuple[str, deque[Row]]] = deque()
        self.next_serial = 1

    @rule(tenant=st.sampled_from(TENANTS))
    def add(self, tenant: str) -> None:
        row = make_row(self.next_serial, tenant=tenant)
        self.next_serial += 1
        self.waiting.add(row)
        queue = next((queue for name, queue in self.turns if name == tenant), None)
        if queue is None:
            self.turns.append((tenant, deque([row])))
        else:
            queue.append(row)

    @precondition(lambda self: self.turns)
    @rule()
    def admit_the_first(self) -> None:
        tenant, queue = self.turns.popleft()
        first = next(iter(self.waiting))
        assert first is queue.popleft()
        self.waiting.remove(first)
        if queue:
            self.turns.append((tenant, queue))

    @invariant()
    def whole_order_is_the_model_played_to_its_end(self) -> None:
        turns = deque((name, deque(queue)) for name, queue in self.turns)
        expected = []
        while turns:
            tenant, queue = turns.popleft()
            expected.append(queue.popleft())
            if queue:
                turns.append((tenant, queue))
        assert list(self.waiting) == expected
        assert len(self.waiting) == len(expected)


TestTurnsSchedule = TurnsSchedule.TestCase
TestTurnsSchedule.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_tenants_are_admitted_in_turn_whoever_has_more_rows() -> None:
    scheduler = make_scheduler(Admitter())
    for serial, tenant in enumerate("aaaaabb", start=1):
        scheduler.add(make_row(serial, tenant=tenant))
    assert [item.row.request.tenant for item in scheduler.schedule()] == ["a", "b", "a", "b", "a", "a", "a"]


def test_turn_goes_on_where_the_last_step_left_it() -> None:
    scheduler = make_scheduler(Admitter(), max_rows=1)
    for serial, tenant in enumerate("aaabbc", start=1):
        scheduler.add(make_row(serial, tenant=tenant))
    order = []
    for _ in range(6):
        (item,) = scheduler.schedule()
        order.append(item.row.request.tenant)
        end(scheduler, item.row)
    assert order == ["a", "b", "c", "a", "b", "a"]


def test_row_without_room_holds_back_those_behind_it() -> None:
    admitter = Admitter(num_slots=1)
    scheduler = make_scheduler(admitter)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial))
    assert serials(scheduler.schedule()) == [1]
    assert admitter.asked == [1, 2], "row 3 was tried although row 2 found no room"
    end(scheduler, scheduler.running[0])
    admitter.num_used = 0
    assert serials(scheduler.schedule()) == [2]


def test_row_whose_prefix_is_not_ready_delays_only_itself_and_keeps_its_place() -> None:
    admitter = Admitter()
    admitter.not_ready = {1}
    scheduler = make_scheduler(admitter, max_rows=3)
    for serial in (1, 2, 3, 4):
        scheduler.add(make_row(serial))
    assert serials(scheduler.schedule()) == [2, 3, 4]
    admitter.not_ready.clear()
    end(scheduler, scheduler.running[0])
    scheduler.add(make_row(5))
    assert serials(scheduler.schedule())[-1] == 1


def test_rows_behind_as_many_cold_prompts_as_may_be_brought_are_not_tried() -> None:
    admitter = Admitter()
    admitter.not_ready = {1, 2}
    scheduler = make_scheduler(admitter, max_cold_prompts=2)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial))
    assert scheduler.schedule() == []
    assert admitter.asked == [1, 2]


def test_long_prompt_is_computed_in_chunks_and_yields_with_the_last() -> None:
    scheduler = make_scheduler(Admitter(), prefill_chunk=4)
    scheduler.add(make_row(1, num_tokens=10))
    chunks = []
    for _ in range(4):
        (item,) = scheduler.schedule()
        chunks.append((item.num_tokens, item.yields_token))
        take([item])
    assert chunks == [(4, False), (4, False), (2, True), (1, True)]


def test_decoding_rows_come_before_a_long_prompt_that_runs_longer() -> None:
    scheduler = make_scheduler(Admitter(), max_rows=4, max_step_tokens=8, prefill_chunk=8)
    scheduler.add(make_row(1, num_tokens=100))
    take(scheduler.schedule())
    for serial in (2, 3, 4):
        scheduler.add(make_row(serial, num_tokens=1))
    late = scheduler.schedule()
    assert serials(late) == [1], "the running prompt takes the whole step"
    for row in list(scheduler.waiting):
        scheduler.waiting.remove(row)
        row.state, row.slot = RowState.RUNNING, Slot(1, row.serial, 100, row.serial, 1)
        scheduler.running.append(row)
    assert [(item.row.serial, item.num_tokens) for item in scheduler.schedule()] == [(2, 1), (3, 1), (4, 1), (1, 5)]


def test_row_is_admitted_with_what_is_left_of_the_budget() -> None:
    scheduler = make_scheduler(Admitter(), max_rows=4, max_step_tokens=10, prefill_chunk=8)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial, num_tokens=20))
    assert [(item.row.serial, item.num_tokens) for item in scheduler.schedule()] == [(1, 8), (2, 2)]
    assert [row.serial for row in scheduler.waiting] == [3]


def test_budget_that_could_not_hold_every_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        make_scheduler(Admitter(), max_rows=9, max_step_tokens=8)


@pytest.mark.parametrize("damage", ["twice", "too many", "no slot", "wrong state", "waiting with a slot"])
def test_invariants_notice_damage(damage: str) -> None:
    scheduler = make_scheduler(Admitter(), max_rows=2, max_step_tokens=2)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial))
    scheduler.schedule()
    scheduler.check_invariants()
    if damage == "twice":
        scheduler.running[1] = scheduler.running[0]
    elif damage == "too many":
        extra = make_row(9)
        extra.state, extra.slot = RowState.RUNNING, Slot(1, 9, 100, 9, 9)
        scheduler.running.append(extra)
    elif damage == "no slot":
        scheduler.running[0].slot = None
    elif damage == "wrong state":
        scheduler.running[0].state = RowState.WAITING
    else:
        next(iter(scheduler.waiting)).slot = Slot(1, 9, 100, 9, 9)
    with pytest.raises(RuntimeError):
        scheduler.check_invariants()
