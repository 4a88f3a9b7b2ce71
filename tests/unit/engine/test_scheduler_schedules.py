"""Who runs next, and with how many tokens: random schedules over a ledger of few pages."""

import math
from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.places import Admission
from server.engine.row import Row, RowState
from server.engine.scheduler import ScheduledRow, Scheduler, StepForm
from tests.unit.engine.scheduling import Memory, end, is_finished, make_row, make_scheduler

TENANTS = ("a", "b", "c")


def victim_by_the_rule(rows: list[Row]) -> Row:
    """Tenants by the pages they hold, most first; of the first that has any row but the oldest of all, the youngest."""
    oldest = min(rows, key=lambda row: row.serial)
    num_pages: Counter[str] = Counter()
    for row in rows:
        num_pages[row.request.tenant] += row.num_pages
    most = sorted(set(num_pages.values()), reverse=True)
    for count in most:
        candidates = [row for row in rows if num_pages[row.request.tenant] == count and row is not oldest]
        if candidates:
            return max(candidates, key=lambda row: row.serial)
    raise AssertionError("the oldest row is alone")


class CheckedMemory(Memory):
    """Checks each victim when it is preempted: for want of pages, or so that another tenant has a place.

    Nobody gives up a place for a row that has run, nor for the same row in two steps.
    """

    scheduler: Scheduler
    num_steps = 0
    is_asked_for_a_place = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.was_given_way: dict[int, int] = {}  # in which step, by serial
        self.has_run: set[int] = set()

    def try_admit(self, row: Row) -> Admission:
        self.is_asked_for_a_place, self.asking = True, row
        return super().try_admit(row)

    def try_extend(self, row: Row, num_tokens: int) -> bool:
        self.is_asked_for_a_place = False
        return super().try_extend(row, num_tokens)

    def preempt(self, row: Row) -> None:
        rows = [*self.scheduler.running, row]
        if self.is_asked_for_a_place:
            self.check_gives_up_its_place(row, rows)
        else:
            assert row is victim_by_the_rule(rows)
        super().preempt(row)
        row.num_in_flight = row.num_pending = 0
        row.num_preemptions += 1

    def check_gives_up_its_place(self, row: Row, rows: list[Row]) -> None:
        """It is the youngest of its tenant, which keeps as many places as the other tenant then has."""
        num_running = Counter(other.request.tenant for other in rows)
        assert row is max((r for r in rows if r.request.tenant == row.request.tenant), key=lambda r: r.serial)
        assert num_running[row.request.tenant] - 1 >= num_running[self.asking.request.tenant] + 1
        assert self.asking.serial not in self.has_run
        assert self.was_given_way.setdefault(self.asking.serial, self.num_steps) == self.num_steps


class Launched:
    """A row as it takes part in a step, and what comes of that."""

    def __init__(self, item: ScheduledRow) -> None:
        self.row, self.num_tokens, self.yields_token = item.row, item.num_tokens, item.yields_token
        self.num_preemptions = item.row.num_preemptions
        self.row.num_computed += self.num_tokens
        self.row.num_in_flight += self.num_tokens
        self.row.num_pending += self.yields_token

    def collect(self) -> None:
        if self.row.state is not RowState.RUNNING or self.row.num_preemptions != self.num_preemptions:
            return
        self.row.num_in_flight -= self.num_tokens
        if self.yields_token:
            self.row.num_pending -= 1
            self.row.token_ids.append(2)


class Schedule(RuleBasedStateMachine):
    """Rows come, run and go in any order, with pages that run short and prefixes that come and go."""

    is_deterministic = False

    @initialize(
        max_rows=st.integers(1, 6),
        spare=st.integers(0, 20),
        chunk=st.integers(1, 12),
        num_pages=st.integers(6, 14),
        max_cold=st.integers(1, 8),
        is_hasty=st.booleans(),
        has_express_steps=st.booleans(),
        overlaps=st.booleans(),
        per_row_s=st.sampled_from([None, 0.0, 0.2, 1.0, 5.0]),
    )
    def start(
        self,
        max_rows: int,
        spare: int,
        chunk: int,
        num_pages: int,
        max_cold: int,
        is_hasty: bool,
        has_express_steps: bool,
        overlaps: bool,
        per_row_s: float | None,
    ) -> None:
        """A step is said to take a second, and so much more for each row and each token; or nothing is said."""
        self.per_row_s, self.now_s = per_row_s, 0.0
        self.num_left_out: Counter[int] = Counter()
        self.has_express_steps, self.overlaps = has_express_steps, overlaps
        self.max_rows, self.chunk, self.max_cold = max_rows, chunk, max_cold
        self.budget = max(max_rows, chunk if self.is_deterministic else 1) + spare
        self.memory = CheckedMemory(num_pages, is_hasty=is_hasty, first_chunk=chunk)
        self.scheduler = make_scheduler(
            self.memory,
            max_rows=max_rows,
            max_step_tokens=self.budget,
            prefill_chunk=chunk,
            max_cold_prompts=max_cold,
            is_deterministic=self.is_deterministic,
            has_express_steps=has_express_steps,
            clock=lambda: self.now_s,
        )
        self.memory.scheduler = self.scheduler
        self.rows: dict[int, Row] = {}
        self.shapes: dict[tuple[int, int], tuple[int, int, bool]] = {}
        self.next_serial = 1
        self.was_express = False
        self.recent: set[str] = set()
        self.in_flight: list[Launched] = []

    @rule(
        tenant=st.sampled_from(TENANTS),
        num_tokens=st.integers(1, 40),
        num_new=st.integers(1, 40),
        is_ready=st.sampled_from([True, True, False]),
        priority=st.sampled_from([0, 0, -1, 1]),
    )
    def submit(self, tenant: str, num_tokens: int, num_new: int, is_ready: bool, priority: int) -> None:
        row = make_row(self.next_serial, tenant=tenant, num_tokens=num_tokens, num_new=num_new, priority=priority)
        self.next_serial += 1
        if not is_ready:
            self.memory.not_ready.add(row.serial)
        self.rows[row.serial] = row
        self.scheduler.add(row)

    @rule()
    def prefixes_arrive(self) -> None:
        self.memory.not_ready.clear()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def row_is_cancelled(self, data: st.DataObject) -> None:
        row = self.rows.pop(data.draw(st.sampled_from(sorted(self.rows))))
        end(self.scheduler, self.memory, row)
        assert row.state is RowState.FINISHED

    @rule(num_steps=st.integers(1, 8))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        running = list(self.scheduler.running)
        order = list(self.scheduler.waiting)
        small, entitled = self.small_and_entitled(running, order)
        self.memory.num_steps += 1
        self.memory.asked.clear()
        self.memory.preempted.clear()
        num_preemptions = self.scheduler.num_preemptions
        scheduled = self.scheduler.schedule()
        tokens_of = {item.row.serial: item.num_tokens for item in scheduled}
        assert len(tokens_of) == len(scheduled), "a row is scheduled twice in a step"
        assert sum(tokens_of.values()) <= self.budget
        for item in scheduled:
            assert 1 <= item.num_tokens <= min(self.chunk, item.row.num_uncomputed)
            assert item.row.state is RowState.RUNNING
            assert item.row.pages is not None
            assert item.row.pages.num_columns >= item.row.next_column + item.num_tokens
        self.check_preempted(running, tokens_of)
        assert self.scheduler.num_preemptions == num_preemptions + len(self.memory.preempted)
        kept = [row for row in running if row.serial not in self.memory.preempted]
        assert self.scheduler.running[: len(kept)] == kept, "running rows have changed their places"
        if self.is_deterministic:
            self.check_shapes(scheduled)
        else:
            self.check_running(kept, scheduled, small)
        tenants = {row.request.tenant for row in (*running, *order)}
        tries_express = self.has_express_steps and not self.is_deterministic and bool(small) and small != tenants
        is_plain = (not entitled or entitled == tenants) and not tries_express
        self.check_admitted(order, kept, tokens_of, is_plain=is_plain)
        if self.scheduler.form is StepForm.LIMITED:
            self.check_turns(kept, tokens_of, small)
        self.recent = {row.request.tenant for row in self.scheduler.running}
        self.memory.has_run |= tokens_of.keys()
        self.num_left_out = Counter({s: n for s, n in self.num_left_out.items() if s not in tokens_of})
        self.tell_how_long_it_took(len(tokens_of), sum(tokens_of.values()))
        self.launch(scheduled)
        for row in [row for row in self.rows.values() if is_finished(row)]:
            end(self.scheduler, self.memory, self.rows.pop(row.serial))

    def check_preempted(self, running: list[Row], tokens_of: dict[int, int]) -> None:
        """They wait, hold nothing and take no part; the oldest is not among them.

        One that has been given a place in this step may have to go again: pages are short for a row that decodes.
        """
        preempted = self.memory.preempted
        assert len(set(preempted)) == len(preempted)
        for serial in preempted:
            row = self.rows[serial]
            assert row in running or serial in self.memory.asked, "a row gave way that did not run"
            assert (row.state, row.pages, row.num_computed) == (RowState.WAITING, None, 0)
            assert serial not in tokens_of
        if running:  # an older one may have been given a place first: then that one is spared
            assert min(*tokens_of, *(row.serial for row in running), math.inf) not in preempted

    def small_and_entitled(self, running: list[Row], order: list[Row]) -> tuple[set[str], set[str]]:
        """The tenants with no more than their share, and those who may have a place before it is their turn."""
        num_running = Counter(row.request.tenant for row in running)
        num_rows = num_running + Counter(row.request.tenant for row in order)
        share = max(1, self.max_rows // max(1, len(num_rows)))
        small = {tenant for tenant, number in num_rows.items() if number <= share}
        is_recent = self.recent if running else set()
        entitled = small | {t for t in num_rows if not num_running[t] and t not in is_recent}
        return small, set() if self.is_deterministic else entitled

    def launch(self, scheduled: list[ScheduledRow]) -> None:
        """Do the step; overlapped, its tokens are known when the next one has been scheduled."""
        before, self.in_flight = self.in_flight, [Launched(item) for item in scheduled]
        for launched in before if self.overlaps else self.in_flight:
            launched.collect()

    def check_running(self, kept: list[Row], scheduled: list[ScheduledRow], small: set[str]) -> None:
        """Rows that decode take part in every step, and so does the oldest: it gets on whatever happens.

        But for express steps: those are of small tenants' rows alone, for a first token, and never two in a row; and
        for steps that are kept short: from those large tenants' rows are left out, but the oldest is not.
        """
        taken = {item.row for item in scheduled}
        oldest = min(kept, key=lambda row: row.serial, default=None)
        left_out = [
            row
            for row in kept
            if row not in taken and (row.num_uncomputed == 1 or (row is oldest and row.num_uncomputed))
        ]
        if self.scheduler.form is StepForm.LIMITED:
            assert not {row for row in left_out if row is oldest or row.request.tenant in small}
            left_out = []
        if left_out:
            assert self.has_express_steps
            assert not self.was_express
            assert {row.request.tenant for row in taken} <= small
            assert any(item.row.num_computed < item.row.num_prompt_tokens for item in scheduled)
            if len(self.memory.preempted) == 0 and self.memory.ledger.num_free:
                assert not small & {row.request.tenant for row in left_out}
        self.was_express = bool(left_out)

    def check_turns(self, kept: list[Row], tokens_of: dict[int, int], small: set[str]) -> None:
        """A step that is kept short leaves nobody out for longer than the others' turns last."""
        assert self.has_express_steps
        assert not self.is_deterministic
        for row in kept:
            if row.num_uncomputed and row.serial not in tokens_of:
                assert row.request.tenant not in small or row.num_uncomputed > 1
                self.num_left_out[row.serial] += 1
                assert self.num_left_out[row.serial] < self.max_rows

    def tell_how_long_it_took(self, num_rows: int, num_tokens: int) -> None:
        seconds = 1.0 + (self.per_row_s or 0.0) * num_tokens
        self.now_s += seconds
        if num_rows and self.per_row_s is not None:
            self.scheduler.step_times.add(num_rows, num_tokens, seconds)

    def check_shapes(self, scheduled: list[ScheduledRow]) -> None:
        """A step is one chunk of one row or one token each of all that are past their client's tokens.

        In what shape a token is computed is the same whenever it is computed again.
        """
        if not scheduled:
            return
        is_chunk = scheduled[0].row.num_computed < scheduled[0].row.num_prompt_tokens
        if is_chunk:
            (item,) = scheduled
            assert item.row.num_computed % self.chunk == 0
            end_token = item.row.num_computed + item.num_tokens
            assert end_token % self.chunk == 0 or end_token == item.row.num_prompt_tokens
        else:
            decoding = [row for row in self.scheduler.running if row.num_computed >= row.num_prompt_tokens]
            assert {item.row for item in scheduled} == {row for row in decoding if row.num_uncomputed}
            assert decoding == self.scheduler.running, "prompts come first"
            assert all(item.num_tokens == 1 for item in scheduled)
        for item in scheduled:
            for token in range(item.row.num_computed, item.row.num_computed + item.num_tokens):
                shape = (item.row.num_computed, item.num_tokens, is_chunk)
                assert self.shapes.setdefault((item.row.serial, token), shape) == shape

    def check_admitted(self, order: list[Row], kept: list[Row], tokens_of: dict[int, int], *, is_plain: bool) -> None:
        """Admissions are asked for in order, and only the last answer may have been that there is no room.

        That is so in a plain step: one in which all tenants are entitled to a place, or none.
        """
        asked, not_ready = self.memory.asked, self.memory.not_ready
        admitted = self.scheduler.running[len(kept) :]
        assert all(row.serial in tokens_of for row in admitted)
        new = {row.serial for row in admitted}
        if is_plain:
            assert asked == [row.serial for row in order][: len(asked)]
            assert not (admitted and self.memory.preempted), "rows are admitted while others are preempted"
            refused = [s for s in asked if s not in new]
            assert all(s in not_ready for s in refused if s != asked[-1])
            assert sum(serial in not_ready for serial in asked) <= self.max_cold
        for tenant in TENANTS:
            queue = [row.serial for row in order if row.request.tenant == tenant]
            first = [serial for serial in asked if serial in queue]
            assert set(first) == set(queue[: len(set(first))]), "a row was passed over by others of its tenant"
        if not admitted and not kept and order:
            cold = [index for index, row in enumerate(order) if row.serial in not_ready]
            reached = order[: cold[self.max_cold - 1]] if len(cold) >= self.max_cold else order
            ready = [row for row in reached if row.serial not in not_ready]
            assert not ready, "nothing runs although a row could"

    @invariant()
    def rows_are_where_they_should_be(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        self.memory.ledger.check_invariants()
        assert len(self.scheduler.waiting) == len(list(self.scheduler.waiting))
        listed = [row.serial for row in (*self.scheduler.running, *self.scheduler.waiting)]
        assert sorted(listed) == sorted(self.rows)
        assert self.memory.ledger.num_used == sum(row.num_pages for row in self.scheduler.running)

    def teardown(self) -> None:
        """Whatever the state: every row that is there is finished in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        self.memory.not_ready.clear()
        # Each row in its turn is the oldest and next to be admitted. Until then each tenant may have one admitted
        # before it, and what runs meanwhile has at most all tokens to compute, one in every ordinary step.
        num_tokens = sum(row.max_total_tokens for row in self.rows.values())
        bound = 4 * len(self.rows) * (len(TENANTS) + 1) * (num_tokens + 1)
        for _ in range(bound + 1):
            if not self.rows:
                break
            self.step()
        assert not self.rows, "a row starved"


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class DeterministicSchedule(Schedule):
    """The same, with steps whose shapes depend on one row alone."""

    is_deterministic = True


TestDeterministicSchedule = DeterministicSchedule.TestCase
TestDeterministicSchedule.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
