"""The places of the batch: who waits for one, who has one, and who gives one up.

Owns the waiting and the running rows, and does with them what the scheduler decides: it admits, takes a row into a step
with pages for its tokens, and preempts where there is no room or another is entitled to a place. Refuses to know which
rows a step should have.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from server.engine.row import Row, RowState
from server.engine.shares import KeptPlaces, Shares
from server.engine.waiting import WaitingRows


class Admission(enum.Enum):
    """What became of an attempt to admit a row."""

    ADMITTED = "admitted"
    PREFIX_NOT_READY = "prefix not ready"
    NO_ROOM = "no room"


class StepDraft:
    """A step in the making: the rows that take part, and what is left for others.

    `others_s` is by how much large tenants may still lengthen it; it may be infinite.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens_of: dict[Row, int] = {}  # in the order in which rows were taken in
        self.others_s = float("inf")
        self.has_preempted = False

    def add(self, row: Row, num_tokens: int) -> None:
        self.num_tokens_of[row] = num_tokens
        self.budget -= num_tokens

    def drop(self, row: Row) -> None:
        """A row has been preempted: it takes no part, and the next chunk may have its tokens."""
        self.budget += self.num_tokens_of.pop(row, 0)
        self.has_preempted = True


class Places:
    """Waiting and running rows, and the ways from one to the other. The callbacks are `Scheduler`'s."""

    def __init__(
        self,
        *,
        max_rows: int,
        quantum: int,
        max_cold_prompts: int,
        try_admit: Callable[[Row], Admission],
        try_extend: Callable[[Row, int], bool],
        preempt: Callable[[Row], None],
    ) -> None:
        self.waiting = WaitingRows(quantum)
        self.running: list[Row] = []
        self.kept = KeptPlaces()
        self.num_preemptions = 0
        self.max_rows = max_rows
        self._quantum = quantum
        self._max_cold_prompts = max_cold_prompts
        self._try_admit = try_admit
        self._try_extend = try_extend
        self._preempt = preempt
        self._num_charged: dict[Row, int] = {}  # how far each row's tokens have been charged

    def add(self, row: Row) -> None:
        self.waiting.add(row, {other.request.tenant for other in self.running})

    def remove(self, row: Row) -> None:
        if row.state is RowState.WAITING:
            self.waiting.remove(row)
        elif row.state is RowState.RUNNING:
            self.running.remove(row)
        row.state = RowState.FINISHED
        self._num_charged.pop(row, None)
        self.kept.end(row)

    def clear(self) -> None:
        for row in [*self.running, *self.waiting]:
            row.state = RowState.FINISHED
        self.running.clear()
        self.waiting = WaitingRows(self._quantum)
        self._num_charged.clear()
        self.kept.clear()

    def check_invariants(self) -> None:
        """Raises RuntimeError when a row is in two places or in the wrong one."""
        serials = [row.serial for row in self.running] + [row.serial for row in self.waiting]
        if len(serials) != len(set(serials)):
            raise RuntimeError("a row is scheduled twice")
        if len(self.running) > self.max_rows:
            raise RuntimeError(f"{len(self.running)} rows run, {self.max_rows} may")
        for row in self.running:
            if row.state is not RowState.RUNNING:
                raise RuntimeError(f"row {row.row_id} is {row.state.value} among the running")
            row.check_invariants()
        for row in self.waiting:
            if row.state is not RowState.WAITING:
                raise RuntimeError(f"row {row.row_id} is {row.state.value} among the waiting")
            row.check_invariants()

    def admissible(
        self, budget: int, rows: Iterable[Row], *, shares: Shares | None = None, num_kept: int = 0
    ) -> Iterator[Row]:
        """Admits of these waiting rows what may be; with `shares`, others give way for rows entitled to a place."""
        max_rows = max(1, self.max_rows - num_kept)
        if budget <= 0 or (shares is None and len(self.running) >= max_rows):
            return
        not_ready: set[str] = set()  # many rows of one cold task count as one
        for row in rows:
            if shares is not None and not shares.is_entitled(row.request.tenant):
                continue  # it has got its place; the rest of its rows wait for their turn
            prompt = row.request.prompt
            key = prompt.prefix_key if prompt is not None else row.row_id
            if key in not_ready:
                continue
            if len(not_ready) >= self._max_cold_prompts:
                return
            if len(self.running) >= max_rows and not self._can_make_way(row, shares):
                return
            admission = self._try_admit(row)
            while admission is Admission.NO_ROOM and shares is not None and self._can_make_way(row, shares):
                self._make_way(shares)
                admission = self._try_admit(row)
            if shares is not None and shares.has_made_way:
                # Were it in vain, or were the row itself sent back, others must not give way for it once more.
                self._num_charged.setdefault(row, 0)
            if admission is Admission.NO_ROOM:
                if not self.running:
                    raise RuntimeError(f"row {row.row_id} has found no room although nothing runs")
                return
            if admission is Admission.PREFIX_NOT_READY:
                not_ready.add(key)
                continue
            if shares is not None:
                is_full = len(self.running) >= max_rows
                if is_full:
                    self._make_way(shares)
                    self._num_charged.setdefault(row, 0)
                self.kept.take(row, is_given_up=is_full)
            self.waiting.remove(row)
            row.state = RowState.RUNNING
            self.running.append(row)
            if shares is not None:
                shares.num_running[row.request.tenant] += 1
            yield row

    def take_in(self, step: StepDraft, row: Row, num_tokens: int) -> None:
        """Put a running row into the step, whoever has to give way for it; it may be the row itself."""
        while row.state is RowState.RUNNING and num_tokens > 0:
            if self._try_extend(row, num_tokens):
                step.add(row, num_tokens)
                return
            victim = self._victim()
            if victim is None:
                raise RuntimeError(f"row {row.row_id} has found no room for {num_tokens} tokens although it is alone")
            self.send_back(victim)
            step.drop(victim)

    def charge(self, row: Row, num_tokens: int) -> None:
        """To the row's tenant, for those of its next `num_tokens` tokens that it has not computed before."""
        end = row.num_computed + num_tokens
        num_new = end - max(row.num_computed, self._num_charged.get(row, 0))
        if num_new > 0:
            self._num_charged[row] = end
            self.waiting.charge(row.request.tenant, num_new)

    def send_back(self, row: Row) -> None:
        """Preempt a running row."""
        self.running.remove(row)
        self._preempt(row)
        row.state = RowState.WAITING
        self.add(row)
        self.num_preemptions += 1

    def _can_make_way(self, row: Row, shares: Shares | None) -> bool:
        """Whether the tenant that runs most gives up a place for this row; not for one that has given way itself."""
        return shares is not None and row not in self._num_charged and shares.can_make_way_for(row.request.tenant)

    def _make_way(self, shares: Shares) -> None:
        """Preempt the youngest row of the tenant that runs most. It runs two at least: the oldest of all is another."""
        tenant = shares.make_way()
        self.send_back(max((r for r in self.running if r.request.tenant == tenant), key=lambda r: r.serial))

    def _victim(self) -> Row | None:
        """The youngest row, but not the oldest of all, of the tenant that holds most pages among those that have one.

        Were the oldest not spared, a long row that is its tenant's only one could give way to new rows for ever.
        """
        oldest = min(self.running, key=lambda r: r.serial)
        num_pages_of: Counter[str] = Counter()
        for row in self.running:
            num_pages_of[row.request.tenant] += row.num_pages
        others = (row for row in self.running if row is not oldest)
        return max(others, key=lambda r: (num_pages_of[r.request.tenant], r.serial), default=None)
