"""Which rows take part in the next step, and with how many tokens. No torch: tested in milliseconds.

There is one token budget a step and no split between prefill and decode (as in vLLM's v1 scheduler): running rows
come first and keep their place, a row with more than one token to compute gets a chunk, and what is left of the budget
admits waiting rows in the order of `waiting`.

Whoever has more rows than the batch has places would fill all of them, and others would wait for a whole generation. So
a tenant may be entitled to a place at once (`shares`): its rows go before all that wait, and if need be the youngest
row of the tenant that runs most gives way. What it gave up is kept for the next such row for a while.

Where a step takes the longer the more tokens it has (on a CPU), a first token would wait for the tokens of all the
others. There new rows of tenants that are small come in an express step, which leaves out the rows of tenants that are
not. Between two express steps there is an ordinary one, and for a while after one ordinary steps are kept short, by
reading little of the prompts of tenants that are not entitled: whoever comes back finds a step under way, and waits for
its end. On a device that computes some hundred tokens in the time of one, that would cost most of its throughput and
gain nothing.

A row holds pages for what it has computed, not for what it may become. When a running row needs pages and there are
none, another is preempted: the youngest of the tenant that holds most. It waits before the younger ones of its tenant
and is computed again later. Why this always comes to an end:

- The oldest running row is never preempted and computes at least one token in every ordinary step, which is at least
  every second one, so it ends. In the deterministic mode it does so in every step that decodes, and few chunks come
  between two of those: after a preemption nobody is admitted before the next.
- While a row that is next to be admitted finds no room nobody is admitted, but for rows entitled to a place that find
  room, so the running rows end one by one, oldest first, and at the latest when none is left there is room for it (the
  engine guarantees that for any row alone).
- Others give way for a row in one step only, whether it finds room by that or not, and never for one that has run.
- Every waiting tenant's turn comes, since each row that is computed is charged to its tenant's balance; and within a
  tenant finitely many rows come before any. So every row comes to be the oldest that is left, and then runs to its end
  without giving way once more.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from server.engine.row import Row, RowState
from server.engine.shares import KeptPlaces, Shares
from server.engine.waiting import DEFAULT_QUANTUM, WaitingRows

# For so many steps after an express step, what tenants that are not entitled generate and read in one is kept to part
# of a chunk; what they generate comes first, and this much they may read however much that is.
NUM_CAUTIOUS_STEPS = 64
CAUTIOUS_SHARE = 5
MIN_CAUTIOUS_TOKENS = 16


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
    shapes in which a token is computed depend on nothing but its place in its own row. Nobody is entitled to a place
    then. `has_express_steps` is for a device on which a step takes the longer the more tokens it has.

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
        has_express_steps: bool = True,
        quantum: int = DEFAULT_QUANTUM,
    ) -> None:
        """Raises ValueError when a step could not hold every running row, or not a whole chunk where it must."""
        if max_step_tokens < max_rows:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least max_rows ({max_rows})")
        if is_deterministic and max_step_tokens < prefill_chunk:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least prefill_chunk ({prefill_chunk})")
        self.waiting = WaitingRows(quantum)
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
        self._has_express_steps = has_express_steps
        self._owes_decode_step = False
        self._owes_ordinary_step = False
        self._num_cautious_steps = 0
        self._quantum = quantum
        self._kept = KeptPlaces()
        self._recent: set[str] = set()  # tenants that had rows running when the last step was made
        self._num_charged: dict[Row, int] = {}  # how far each row's tokens have been charged

    def add(self, row: Row) -> None:
        self.waiting.add(row, {other.request.tenant for other in self.running})

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is. The caller frees its pages and its prefix."""
        if row.state is RowState.WAITING:
            self.waiting.remove(row)
        elif row.state is RowState.RUNNING:
            self.running.remove(row)
        row.state = RowState.FINISHED
        self._num_charged.pop(row, None)
        self._kept.end(row)

    def clear(self) -> None:
        """Forget all rows: the engine has ended."""
        for row in [*self.running, *self.waiting]:
            row.state = RowState.FINISHED
        self.running.clear()
        self.waiting = WaitingRows(self._quantum)
        self._num_charged.clear()
        self._kept.clear()

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
            self._kept.begin_step()
            shares = Shares(self.running, self.waiting, self._max_rows, self._recent)
            if not self._schedule_express(step, shares):
                self._give_places(step, shares)
                self._schedule_running(step, shares)
                if not step.has_preempted and not shares.has_made_way:
                    self._schedule_waiting(step, shares)
            self._recent = {row.request.tenant for row in self.running}
        for row, num_tokens in step.num_tokens_of.items():
            self._charge(row, num_tokens)
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

    def _schedule_express(self, step: "_Step", shares: Shares) -> bool:
        """First tokens of small tenants, without the rows of the others; False when there is nothing of the kind."""
        may_be_express = self._has_express_steps and not self._owes_ordinary_step
        self._owes_ordinary_step = False
        self._num_cautious_steps = max(0, self._num_cautious_steps - 1)
        if not may_be_express or not shares.small or shares.entitled == shares.tenants:
            return False
        rows = [row for row in self.running if row.request.tenant in shares.small]
        rows.sort(key=lambda r: (r.num_uncomputed > 1, r.serial))
        self._admit(step, step.budget - len(rows), self.waiting.of_tenants(shares.small), shares=shares)
        near = [(row, min(row.num_uncomputed, self._prefill_chunk)) for row in rows if self._is_near_first_token(row)]
        if not step.num_tokens_of and not any(self._try_extend(row, num_tokens) for row, num_tokens in near):
            return False
        for row in rows:
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, step.budget)
            if num_tokens > 0 and self._try_extend(row, num_tokens):
                step.add(row, num_tokens)
        if step.num_tokens_of:
            self._owes_ordinary_step, self._num_cautious_steps = True, NUM_CAUTIOUS_STEPS
        return self._owes_ordinary_step

    def _give_places(self, step: "_Step", shares: Shares) -> None:
        """Rows entitled to a place that no express step is for. A token is left for every row that runs already."""
        entitled = shares.entitled
        if entitled != shares.tenants:
            tenants = entitled - shares.small if self._has_express_steps else entitled
            num_others = min(len(self.running), self._max_rows - 1)
            self._admit(step, step.budget - num_others, self.waiting.of_tenants(tenants), shares=shares)

    def _admit(
        self, step: "_Step", budget: int, rows: Iterable[Row], *, shares: Shares | None = None, num_kept: int = 0
    ) -> None:
        """Admit of these waiting rows what may be, with chunks of so many tokens together."""
        for row in self._admissible(budget, rows, shares=shares, num_kept=num_kept):
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, budget)
            step.add(row, num_tokens)
            budget -= num_tokens
            if budget <= 0:
                return

    def _is_near_first_token(self, row: Row) -> bool:
        """A long prompt is many steps away from it: others need not wait for that."""
        return row.num_prompt_tokens - self._prefill_chunk <= row.num_computed < row.num_prompt_tokens

    def _schedule_running(self, step: "_Step", shares: Shares) -> None:
        step.num_cautious_tokens = self._num_cautious_tokens(shares)
        # Rows that decode first: a long prompt must not push the others' next token out of the step. Then the oldest,
        # which must get on.
        for row in sorted(self.running, key=lambda r: (r.num_uncomputed > 1, r.serial)):
            if row in step.num_tokens_of:
                continue
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, step.budget)
            if num_tokens > 1 and not shares.is_entitled(row.request.tenant):
                num_tokens = self._with_caution(step, num_tokens)
            self._take_in(step, row, num_tokens)

    def _schedule_waiting(self, step: "_Step", shares: Shares) -> None:
        num_kept = len(self._kept) if shares.entitled != shares.tenants else 0
        self._admit(step, self._with_caution(step, step.budget), self.waiting, num_kept=num_kept)

    def _with_caution(self, step: "_Step", num_tokens: int) -> int:
        """What of these tokens of prompts the step should read, if it comes soon after an express step."""
        if not self._num_cautious_steps:
            return num_tokens
        allowed = min(num_tokens, step.num_cautious_tokens)
        step.num_cautious_tokens -= allowed
        return allowed

    def _num_cautious_tokens(self, shares: Shares) -> int:
        """How much a short step may read of the prompts of tenants that are not entitled to a place."""
        num_decoding = sum(r.num_uncomputed == 1 and not shares.is_entitled(r.request.tenant) for r in self.running)
        least = min(MIN_CAUTIOUS_TOKENS, self._prefill_chunk)
        return max(least, self._prefill_chunk // CAUTIOUS_SHARE - num_decoding)

    def _schedule_chunk(self, step: "_Step") -> None:
        """One chunk of the row that has client tokens to compute (one at a time runs), else of the next that waits."""
        for row in self.running:
            if row.num_computed < row.num_prompt_tokens:
                self._take_in(step, row, self._chunk_of(row))
                return
        # Two rows that push each other out while they compute their chunks would keep all others from decoding.
        if not self.running or not self._owes_decode_step:
            for row in self._admissible(step.budget, self.waiting):
                step.add(row, self._chunk_of(row))
                return

    def _schedule_decodes(self, step: "_Step") -> None:
        self._owes_decode_step = False
        for row in sorted(self.running, key=lambda r: r.serial):
            if row.num_computed >= row.num_prompt_tokens:
                self._take_in(step, row, min(row.num_uncomputed, 1))

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
            self._send_back(victim)
            self._owes_decode_step = True
            step.drop(victim)

    def _send_back(self, row: Row) -> None:
        """Preempt a running row."""
        self.running.remove(row)
        self._preempt(row)
        row.state = RowState.WAITING
        self.waiting.add(row, {other.request.tenant for other in self.running})
        self.num_preemptions += 1

    def _can_make_way(self, row: Row, shares: Shares | None) -> bool:
        """Whether the tenant that runs most gives up a place for this row; not for one that has given way itself."""
        return shares is not None and row not in self._num_charged and shares.can_make_way_for(row.request.tenant)

    def _make_way(self, shares: Shares) -> None:
        """Preempt the youngest row of the tenant that runs most. It runs two at least: the oldest of all is another."""
        tenant = shares.make_way()
        self._send_back(max((r for r in self.running if r.request.tenant == tenant), key=lambda r: r.serial))

    def _charge(self, row: Row, num_tokens: int) -> None:
        """To the row's tenant, for those of its next `num_tokens` tokens that it has not computed before."""
        end = row.num_computed + num_tokens
        num_new = end - max(row.num_computed, self._num_charged.get(row, 0))
        if num_new > 0:
            self._num_charged[row] = end
            self.waiting.charge(row.request.tenant, num_new)

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

    def _admissible(
        self, budget: int, rows: Iterable[Row], *, shares: Shares | None = None, num_kept: int = 0
    ) -> Iterator[Row]:
        """Admits of these waiting rows what may be; with `shares`, others give way for rows entitled to a place."""
        max_rows = max(1, self._max_rows - num_kept)
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
                self._kept.take(row, is_given_up=is_full)
            self.waiting.remove(row)
            row.state = RowState.RUNNING
            self.running.append(row)
            if shares is not None:
                shares.num_running[row.request.tenant] += 1
            yield row


class _Step:
    """A step in the making: the rows that take part, and what is left of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens_of: dict[Row, int] = {}  # in the order in which rows were taken in
        self.num_cautious_tokens = 0  # what a step that is kept short may still read
        self.has_preempted = False

    def add(self, row: Row, num_tokens: int) -> None:
        self.num_tokens_of[row] = num_tokens
        self.budget -= num_tokens

    def drop(self, row: Row) -> None:
        """A row has been preempted: it takes no part, and the next chunk may have its tokens."""
        self.budget += self.num_tokens_of.pop(row, 0)
        self.has_preempted = True
