"""Which rows take part in the next step, and with how many tokens. No torch: tested in milliseconds.

There is one token budget a step and no split between prefill and decode (as in vLLM's v1 scheduler): running rows
come first and keep their place, a row with more than one token to compute gets a chunk, and what is left of the budget
admits waiting rows, tenants in turn.

A row holds pages for what it has computed, not for what it may become. When a running row needs pages and there are
none, another is preempted: the youngest of the tenant that holds most. It waits at the head of its tenant's queue and
is computed again later. Why this always comes to an end:

- The oldest running row is never preempted and computes at least one token in every step, so it ends. In the
  deterministic mode it does so in every step that decodes, and few chunks come between two of those: after a
  preemption nobody is admitted before the next.
- While a row that is next to be admitted finds no room nobody is admitted, so the running rows end one by one, oldest
  first, and at the latest when none is left there is room for it (the engine guarantees that for any row alone).
- Tenants take turns at being next, and within a tenant the oldest is, preempted rows among them. So every row comes to
  be the oldest that is left, and then runs to its end without giving way once more.
"""

import enum
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.engine.row import Row, RowState


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """`num_tokens` of the row's uncomputed tokens are computed in this step."""

    row: Row
    num_tokens: int

    @property
    def yields_token(self) -> bool:
        """Whether the step reaches the row's last token, so that a new one is sampled."""
        return self.num_tokens == self.row.num_uncomputed


class Admission(enum.Enum):
    """What became of an attempt to admit a row."""

    ADMITTED = "admitted"
    PREFIX_NOT_READY = "prefix not ready"
    NO_ROOM = "no room"


class WaitingRows:
    """Waiting rows, oldest first within a tenant, tenants in turn."""

    def __init__(self) -> None:
        self._by_tenant: OrderedDict[str, list[Row]] = OrderedDict()
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order in which they would be admitted if nothing held any of them back.

        Lazy, so that a look at the first of very many costs little; rows may be removed meanwhile.
        """
        queues = [iter(tuple(rows)) for rows in self._by_tenant.values()]
        while queues:
            left = []
            for queue in queues:
                row = next(queue, None)
                if row is not None:
                    left.append(queue)
                    yield row
            queues = left

    def add(self, row: Row) -> None:
        insort(self._by_tenant.setdefault(row.request.tenant, []), row, key=lambda r: r.serial)
        self._num_rows += 1

    def remove(self, row: Row) -> None:
        """Take the row out and put its tenant at the end of the turn."""
        tenant = row.request.tenant
        self._by_tenant[tenant].remove(row)
        self._num_rows -= 1
        if self._by_tenant[tenant]:
            self._by_tenant.move_to_end(tenant)
        else:
            del self._by_tenant[tenant]


class Scheduler:
    """Holds the waiting and the running rows.

    Three callbacks are the engine's. `try_admit(row)` gives the row its prefix and pages for its first chunk at least,
    and says whether it could. A row whose prefix is still being loaded delays only itself; one for which there is no
    room holds those behind it back, since a long row would otherwise wait for ever behind short ones; a row that is
    alone must find room. At most `max_cold_prompts` prompts are being brought for rows that wait.
    `try_extend(row, num_tokens)` gives a running row pages for its next `num_tokens` columns, False when memory is
    short; for a row that is alone it must succeed. `preempt(row)` takes a row's pages and sets `num_computed` to 0.

    With `is_deterministic` a step is one chunk of one row's client tokens, or one token each of all rows that have
    theirs behind them; chunks come first, and their bounds are multiples of `prefill_chunk` from the row's first token.
    Generated tokens that a preempted row computes again are computed one by one, as they were the first time. So the
    shapes in which a token is computed depend on nothing but its place in its own row.

    Not thread-safe: the engine thread owns it. Other threads may read `num_preemptions`.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_step_tokens: int,
        prefill_chunk: int,
        try_admit: Callable[[Row], Admission],
        try_extend: Callable[[Row, int], bool],
        preempt: Callable[[Row], None],
        max_cold_prompts: int | None = None,
        is_deterministic: bool = False,
    ) -> None:
        """Raises ValueError when a step could not hold every running row, or not a whole chunk where it must."""
        if max_step_tokens < max_rows:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least max_rows ({max_rows})")
        if is_deterministic and max_step_tokens < prefill_chunk:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least prefill_chunk ({prefill_chunk})")
        self.waiting = WaitingRows()
        self.running: list[Row] = []
        self.num_preemptions = 0
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._prefill_chunk = prefill_chunk
        self._try_admit = try_admit
        self._try_extend = try_extend
        self._preempt = preempt
        self._max_cold_prompts = max_cold_prompts if max_cold_prompts is not None else 2 * max_rows
        self._is_deterministic = is_deterministic
        self._owes_decode_step = False

    def add(self, row: Row) -> None:
        self.waiting.add(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is. The caller frees its pages and its prefix."""
        if row.state is RowState.WAITING:
            self.waiting.remove(row)
        elif row.state is RowState.RUNNING:
            self.running.remove(row)
        row.state = RowState.FINISHED

    def clear(self) -> None:
        """Forget all rows: the engine has ended."""
        for row in [*self.running, *self.waiting]:
            row.state = RowState.FINISHED
        self.running.clear()
        self.waiting = WaitingRows()

    def schedule(self) -> list[ScheduledRow]:
        """The rows of the next step, each with pages for its tokens. Empty when nothing can run.

        Raises RuntimeError when a row that is alone finds no room, which the engine guarantees.
        """
        step = _Step(self._max_step_tokens)
        if self._is_deterministic:
            self._schedule_chunk(step)
            if not step.num_tokens_of:
                self._schedule_decodes(step)
        else:
            self._schedule_running(step)
            if not step.has_preempted:
                self._schedule_waiting(step)
        return [ScheduledRow(row, num_tokens) for row, num_tokens in step.num_tokens_of.items()]

    def check_invariants(self) -> None:
        """Raises RuntimeError when a row is in two places or in the wrong one."""
        serials = [row.serial for row in self.running] + [row.serial for row in self.waiting]
        if len(serials) != len(set(serials)):
            raise RuntimeError("a row is scheduled twice")
        if len(self.running) > self._max_rows:
            raise RuntimeError(f"{len(self.running)} rows run, {self._max_rows} may")
        for row in self.running:
            if row.state is not RowState.RUNNING:
                raise RuntimeError(f"row {row.row_id} is {row.state.value} among the running")
            row.check_invariants()
        for row in self.waiting:
            if row.state is not RowState.WAITING:
                raise RuntimeError(f"row {row.row_id} is {row.state.value} among the waiting")
            row.check_invariants()

    def _schedule_running(self, step: "_Step") -> None:
        # Rows that decode first: a long prompt must not push the others' next token out of the step. Then the oldest,
        # which must get on.
        for row in sorted(self.running, key=lambda r: (r.num_uncomputed > 1, r.serial)):
            self._take_in(step, row, min(row.num_uncomputed, self._prefill_chunk, step.budget))

    def _schedule_waiting(self, step: "_Step") -> None:
        for row in self._admissible(step.budget):
            step.add(row, min(row.num_uncomputed, self._prefill_chunk, step.budget))
            if step.budget <= 0:
                return

    def _schedule_chunk(self, step: "_Step") -> None:
        """One chunk of the row that has client tokens to compute (one at a time runs), else of the next that waits."""
        for row in self.running:
            if row.num_computed < row.num_prompt_tokens:
                self._take_in(step, row, self._chunk_of(row))
                return
        # Two rows that push each other out while they compute their chunks would keep all others from decoding.
        if not self.running or not self._owes_decode_step:
            for row in self._admissible(step.budget):
                step.add(row, self._chunk_of(row))
                return

    def _schedule_decodes(self, step: "_Step") -> None:
        self._owes_decode_step = False
        for row in sorted(self.running, key=lambda r: r.serial):
            if row.num_computed >= row.num_prompt_tokens:
                self._take_in(step, row, 1)

    def _chunk_of(self, row: Row) -> int:
        """Up to the next bound of a chunk, or to the end of the client's tokens."""
        bound = (row.num_computed // self._prefill_chunk + 1) * self._prefill_chunk
        return min(bound, row.num_prompt_tokens) - row.num_computed

    def _take_in(self, step: "_Step", row: Row, num_tokens: int) -> None:
        """Put a running row into the step, whoever has to give way for it; it may be the row itself."""
        while row.state is RowState.RUNNING and num_tokens > 0:
            if self._try_extend(row, num_tokens):
                step.add(row, num_tokens)
                return
            victim = self._victim()
            if victim is None:
                raise RuntimeError(f"row {row.row_id} has found no room for {num_tokens} tokens although it is alone")
            self.running.remove(victim)
            self._preempt(victim)
            victim.state = RowState.WAITING
            self.waiting.add(victim)
            self.num_preemptions += 1
            self._owes_decode_step = True
            step.drop(victim)

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

    def _admissible(self, budget: int) -> Iterator[Row]:
        if budget <= 0 or len(self.running) >= self._max_rows:
            return
        not_ready: set[str] = set()  # many rows of one cold task count as one
        for row in self.waiting:
            prompt = row.request.prompt
            key = prompt.prefix_key if prompt is not None else row.row_id
            if key in not_ready:
                continue
            if len(not_ready) >= self._max_cold_prompts or len(self.running) >= self._max_rows:
                return
            admission = self._try_admit(row)
            if admission is Admission.NO_ROOM:
                if not self.running:
                    raise RuntimeError(f"row {row.row_id} has found no room although nothing runs")
                return
            if admission is Admission.PREFIX_NOT_READY:
                not_ready.add(key)
                continue
            self.waiting.remove(row)
            row.state = RowState.RUNNING
            self.running.append(row)
            yield row


class _Step:
    """A step in the making: the rows that take part, and what is left of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens_of: dict[Row, int] = {}  # in the order in which rows were taken in
        self.has_preempted = False

    def add(self, row: Row, num_tokens: int) -> None:
        self.num_tokens_of[row] = num_tokens
        self.budget -= num_tokens

    def drop(self, row: Row) -> None:
        """A row has been preempted: it takes no part, and the next chunk may have its tokens."""
        self.budget += self.num_tokens_of.pop(row, 0)
        self.has_preempted = True
