"""Rows, and pages of a small ledger for them, as the scheduler's tests need them: no model, no tokens of meaning."""

from collections.abc import Callable, Iterable

from server.engine.pages import PAGE_SIZE, PageLedger
from server.engine.places import Admission
from server.engine.request import RowRequest, SamplingParams
from server.engine.row import Row, RowState
from server.engine.row_pages import RowPages
from server.engine.scheduler import ScheduledRow, Scheduler
from server.engine.text import TextStream


class NoTokenizer:
    """The scheduler reads no text."""

    def decode(self, token_ids: object, *, skip_special_tokens: bool = False, **kwargs: object) -> str:
        raise AssertionError("the scheduler decoded a token")


def make_row(serial: int, *, tenant: str = "a", num_tokens: int = 1, num_new: int = 50, priority: int = 0) -> Row:
    request = RowRequest(
        row_id=f"row-{serial}",
        tenant=tenant,
        token_ids=(1,) * num_tokens,
        prompt=None,
        sampling=SamplingParams(max_tokens=num_new),
        priority=priority,
    )
    text = TextStream(NoTokenizer(), context=request.token_ids, stop=(), skip_special_tokens=True)
    return Row(request=request, serial=serial, arrived_at_s=0.0, text=text)


def num_pages_for(num_columns: int) -> int:
    return -(-num_columns // PAGE_SIZE)


class Memory:
    """The engine's side: pages of a ledger, and rows in `not_ready` that wait for their prefix.

    Admission gives pages for all known tokens, and asks for one more to be free; `is_hasty` gives them for the first
    chunk only, and asks for nothing: whatever was admitted must come to its end all the same.
    """

    def __init__(self, num_pages: int = 1000, *, is_hasty: bool = False, first_chunk: int = 1) -> None:
        self.ledger = PageLedger(num_pages)
        self.not_ready: set[int] = set()
        self.asked: list[int] = []
        self.preempted: list[int] = []
        self._is_hasty = is_hasty
        self._first_chunk = first_chunk

    def try_admit(self, row: Row) -> Admission:
        if self.asked[-1:] != [row.serial]:  # asked again when another has given way
            self.asked.append(row.serial)
        if row.serial in self.not_ready:
            return Admission.PREFIX_NOT_READY
        num_known = min(len(row.token_ids), self._first_chunk) if self._is_hasty else len(row.token_ids)
        num_pages = num_pages_for(num_known)
        if num_pages + (not self._is_hasty) > self.ledger.num_free:
            return Admission.NO_ROOM
        row.pages = RowPages(row.max_total_tokens + PAGE_SIZE)
        self.give(row, num_pages)
        return Admission.ADMITTED

    def give(self, row: Row, num_pages: int) -> None:
        pages = self.ledger.allocate(row.serial, num_pages)
        assert pages is not None
        assert row.pages is not None
        row.pages.append(pages, self.ledger)

    def try_extend(self, row: Row, num_tokens: int) -> bool:
        assert row.pages is not None
        assert num_tokens > 0
        missing = num_pages_for(row.next_column + num_tokens) - row.pages.num_pages
        if missing > self.ledger.num_free:
            return False
        self.give(row, max(0, missing))
        return True

    def preempt(self, row: Row) -> None:
        self.preempted.append(row.serial)
        self.take_back(row)
        row.num_computed = 0

    def take_back(self, row: Row) -> None:
        if row.pages is not None:
            self.ledger.release(row.pages.held, row.serial)
            row.pages = None


def make_scheduler(
    memory: Memory,
    *,
    max_rows: int = 8,
    max_step_tokens: int = 100,
    prefill_chunk: int = 50,
    max_cold_prompts: int | None = None,
    is_deterministic: bool = False,
    has_express_steps: bool = True,
    quantum: int = 1,
    clock: Callable[[], float] = lambda: 0.0,
) -> Scheduler:
    return Scheduler(
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        prefill_chunk=prefill_chunk,
        try_admit=memory.try_admit,
        try_extend=memory.try_extend,
        preempt=memory.preempt,
        max_cold_prompts=max_cold_prompts,
        is_deterministic=is_deterministic,
        has_express_steps=has_express_steps,
        quantum=quantum,
        clock=clock,
    )


def take(scheduled: list[ScheduledRow]) -> None:
    """Do what a step does to the rows: compute their tokens, and give a new one to those that reach their end."""
    for item in scheduled:
        yields_token = item.yields_token
        item.row.num_computed += item.num_tokens
        if yields_token:
            item.row.token_ids.append(2)


def end(scheduler: Scheduler, memory: Memory, row: Row) -> None:
    memory.take_back(row)
    scheduler.remove(row)


def is_finished(row: Row) -> bool:
    return row.num_generated >= row.request.sampling.max_tokens


def run_to_end(scheduler: Scheduler, memory: Memory, rows: Iterable[Row], max_steps: int) -> int:
    """Step until all rows are finished; returns in how many steps they were."""
    left = list(rows)
    for num_steps in range(max_steps + 1):
        for row in [row for row in left if is_finished(row)]:
            left.remove(row)
            end(scheduler, memory, row)
        if not left:
            return num_steps
        scheduled = scheduler.schedule()
        scheduler.check_invariants()
        memory.ledger.check_invariants()
        take(scheduled)
    raise AssertionError(f"rows {[row.serial for row in left]} are not finished after {max_steps} steps")


def serials(scheduled: list[ScheduledRow]) -> list[int]:
    return [item.row.serial for item in scheduled]


def put_to_work(
    scheduler: Scheduler,
    memory: Memory,
    serial: int,
    *,
    tenant: str = "a",
    num_tokens: int,
    num_prompt_tokens: int | None = None,
) -> Row:
    """A running row with one token to compute. After a multiple of 16 others it needs a page more for it.

    Its tokens from `num_prompt_tokens` on are generated ones; None: all are the client's.
    """
    row = make_row(serial, tenant=tenant, num_tokens=num_prompt_tokens or num_tokens)
    row.token_ids += [2] * (num_tokens - len(row.token_ids))
    row.num_computed = num_tokens - 1
    row.state, row.pages = RowState.RUNNING, RowPages(row.max_total_tokens)
    memory.give(row, num_pages_for(row.num_computed))
    scheduler.running.append(row)
    return row
