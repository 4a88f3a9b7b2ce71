"""Which rows take part in the next step, and with how many tokens. No torch: tested in milliseconds.

There is one token budget a step and no split between prefill and decode (as in vLLM's v1 scheduler): running rows
come first and keep their place, a row with more than one token to compute gets a chunk, and what is left of the budget
admits waiting rows in the order of `waiting`.

Whoever has more rows than the batch has places would fill all of them, and others would wait for a whole generation. So
a tenant may be entitled to a place at once (`shares`): its rows go before all that wait, and if need be the youngest
row of the tenant that runs most gives way. What it gave up is kept for the next such row for a while.

Where a step takes the longer the more tokens it has (on a CPU), a first token would wait for the tokens of all the
others, and each later one too. There new rows of tenants that are small come in an express step, which leaves out the
rows of those that are large. Between two express steps there is an ordinary one, and while a small tenant is about
ordinary steps are limited (`caution`): large tenants get so much of each as leaves the small one half of its speed. Of
their rows the oldest takes part in every ordinary step, and the others in turn, least recently first.
On a device that computes some hundred tokens in the time of one, express steps would cost most of its throughput and
gain nothing.

A row holds pages for what it has computed, not for what it may become. When a running row needs pages and there are
none, another is preempted: the youngest of the tenant that holds most. It waits before the younger ones of its tenant
and is computed again later. Why this always comes to an end:

- The oldest running row is never preempted and computes at least one token in every ordinary step, which is at least
  every second one, so it ends. In the deterministic mode it does so in every step that decodes, and no more rows are
  admitted between two of those than run then; after a preemption nobody is.
- A limited step has besides the oldest the row that has waited longest for its turn, so a running row is left out of
  fewer ordinary steps in a row than there are places.
- While a row that is next to be admitted finds no room nobody is admitted, but for rows entitled to a place that find
  room, so the running rows end one by one, oldest first, and at the latest when none is left there is room for it (the
  engine guarantees that for any row alone).
- Others give way for a row in one step only, whether it finds room by that or not, and never for one that has run.
- Every waiting tenant's turn comes, since each row that is computed is charged to its tenant's balance; and within a
  tenant finitely many rows come before any. So every row comes to be the oldest that is left, and then runs to its end
  without giving way once more.
"""

import enum
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.engine.caution import Caution
from server.engine.places import Admission, Places, StepDraft
from server.engine.row import Row
from server.engine.shares import Shares
from server.engine.step_times import StepTimes
from server.engine.waiting import DEFAULT_QUANTUM, WaitingRows

MIN_LIMITED_TOKENS = 16
"""A row whose turn has come reads so much of its prompt at least, however short the step is to be."""


class StepForm(enum.Enum):
    """Whether a step left anybody's rows out for others' sake."""

    FULL = "full"
    LIMITED = "limited"
    EXPRESS = "express"


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """`num_tokens` of the row's uncomputed tokens are computed in this step."""

    row: Row
    num_tokens: int

    @property
    def yields_token(self) -> bool:
        """Whether the step reaches the row's last token, so that a new one is sampled."""
        return self.num_tokens == self.row.num_uncomputed


class Scheduler:
    """Decides what the rows of each step are; `Places` holds the rows that wait and those that run.

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
    then. `has_express_steps` is for a device on which a step takes the longer the more tokens it has; only there are
    steps limited, by what `step_times` has been told of steps that were done.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError when a step could not hold every running row, or not a whole chunk where it must."""
        if max_step_tokens < max_rows:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least max_rows ({max_rows})")
        if is_deterministic and max_step_tokens < prefill_chunk:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least prefill_chunk ({prefill_chunk})")
        self._places = Places(
            max_rows=max_rows,
            quantum=quantum,
            max_cold_prompts=max_cold_prompts if max_cold_prompts is not None else 2 * max_rows,
            try_admit=try_admit,
            try_extend=try_extend,
            preempt=preempt,
        )
        self.step_times = StepTimes()
        self.form = StepForm.FULL  # of the last step
        self._caution = Caution(self.step_times, clock)
        self._max_step_tokens = max_step_tokens
        self._prefill_chunk = prefill_chunk
        self._try_extend = try_extend
        self._is_deterministic = is_deterministic
        self._has_express_steps = has_express_steps
        self._owes_decode_step = False
        self._num_admitted = 0  # since the last step that decoded, in the deterministic mode
        self._owes_ordinary_step = False
        self._recent: set[str] = set()  # tenants that had rows running when the last step was made
        self._num_steps = 0
        self._last_step_of: dict[Row, int] = {}  # of running rows, in which they took part last

    @property
    def waiting(self) -> WaitingRows:
        return self._places.waiting

    @property
    def running(self) -> list[Row]:
        return self._places.running

    @property
    def num_preemptions(self) -> int:
        return self._places.num_preemptions

    def add(self, row: Row) -> None:
        self._places.add(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is. The caller frees its pages and its prefix."""
        self._places.remove(row)
        self._last_step_of.pop(row, None)

    def clear(self) -> None:
        """Forget all rows: the engine has ended."""
        self._places.clear()
        self._caution.clear()
        self._last_step_of.clear()

    def check_invariants(self) -> None:
        """Raises RuntimeError when a row is in two places or in the wrong one."""
        self._places.check_invariants()
        left = self._last_step_of.keys() - {*self.running, *self.waiting}
        if left:
            raise RuntimeError(f"{len(left)} rows that are gone are remembered")

    def schedule(self) -> list[ScheduledRow]:
        """The rows of the next step, each with pages for its tokens. Empty when nothing can run.

        Raises RuntimeError when a row that is alone finds no room, which the engine guarantees.
        """
        step = StepDraft(self._max_step_tokens)
        self.form = StepForm.FULL
        self._num_steps += 1
        if self._is_deterministic:
            self._schedule_chunk(step)
            if not step.num_tokens_of:
                self._schedule_decodes(step)
        else:
            self._places.kept.begin_step()
            shares = Shares(self.running, self.waiting, self._places.max_rows, self._recent)
            if not self._schedule_express(step, shares):
                self._give_places(step, shares)
                self._schedule_running(step, shares)
                if not step.has_preempted and not shares.has_made_way:
                    self._schedule_waiting(step, shares)
            self._recent = {row.request.tenant for row in self.running}
            self._remember(step, shares)
        for row, num_tokens in step.num_tokens_of.items():
            self._places.charge(row, num_tokens)
        return [ScheduledRow(row, num_tokens) for row, num_tokens in step.num_tokens_of.items()]

    def _schedule_express(self, step: StepDraft, shares: Shares) -> bool:
        """First tokens of small tenants, without the rows of the others; False when there is nothing of the kind."""
        may_be_express = self._has_express_steps and not self._owes_ordinary_step
        self._owes_ordinary_step = False
        if not may_be_express or not shares.small or not shares.large:
            return False
        rows = [row for row in self.running if row.request.tenant in shares.small]
        rows.sort(key=lambda r: (r.num_uncomputed > 1, not self._is_near_first_token(r), r.serial))
        self._admit(step, step.budget - len(rows), self.waiting.of_tenants(shares.small), shares=shares)
        near = [(row, min(row.num_uncomputed, self._prefill_chunk)) for row in rows if self._is_near_first_token(row)]
        if not step.num_tokens_of and not any(self._try_extend(row, num_tokens) for row, num_tokens in near):
            return False
        for place, row in enumerate(rows):
            num_behind = len(rows) - place - 1  # a token is left for each
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, step.budget - num_behind)
            if num_tokens > 0 and self._try_extend(row, num_tokens):
                step.add(row, num_tokens)
        if step.num_tokens_of:
            self._owes_ordinary_step, self.form = True, StepForm.EXPRESS
        return self._owes_ordinary_step

    def _give_places(self, step: StepDraft, shares: Shares) -> None:
        """Rows entitled to a place that no express step is for. A token is left for every row that runs already."""
        entitled = shares.entitled
        if entitled != shares.tenants:
            tenants = entitled - shares.small if self._has_express_steps else entitled
            num_others = min(len(self.running), self._places.max_rows - 1)
            self._admit(step, step.budget - num_others, self.waiting.of_tenants(tenants), shares=shares)

    def _admit(
        self, step: StepDraft, budget: int, rows: Iterable[Row], *, shares: Shares | None = None, num_kept: int = 0
    ) -> None:
        """Admit of these waiting rows what may be, with chunks of so many tokens together."""
        for row in self._places.admissible(budget, rows, shares=shares, num_kept=num_kept):
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, budget)
            step.add(row, num_tokens)
            step.others_s -= self.step_times.of_one_more_row(num_tokens)
            budget = self.step_times.num_tokens_within(step.others_s, budget - num_tokens)
            if budget <= 0:
                return

    def _is_near_first_token(self, row: Row) -> bool:
        """A long prompt is many steps away from it: others need not wait for that."""
        return row.num_prompt_tokens - self._prefill_chunk <= row.num_computed < row.num_prompt_tokens

    def _schedule_running(self, step: StepDraft, shares: Shares) -> None:
        # Rows that decode first: a long prompt must not push the others' next token out of the step. Then the oldest,
        # which must get on.
        rows = sorted(self.running, key=lambda r: (r.num_uncomputed > 1, r.serial))
        rows = [row for row in rows if row not in step.num_tokens_of]
        step.others_s = self._seconds_for_others(step, rows, shares)
        if step.others_s < math.inf:
            self._schedule_within(step, rows, shares)
            return
        for row in rows:
            self._take_in(step, row, min(row.num_uncomputed, self._prefill_chunk, step.budget))

    def _seconds_for_others(self, step: StepDraft, rows: Sequence[Row], shares: Shares) -> float:
        """By how much large tenants may lengthen a step of small ones."""
        if not self._has_express_steps or not shares.large:
            return math.inf
        own = [row for row in rows if row.num_uncomputed and row.request.tenant in shares.small]
        num_tokens = sum(min(row.num_uncomputed, self._prefill_chunk) for row in own)
        return self._caution.seconds_for_others(shares, len(own), max(len(own), min(num_tokens, step.budget)))

    def _schedule_within(self, step: StepDraft, rows: Sequence[Row], shares: Shares) -> None:
        """All rows of small tenants; of the others' what there is time for, and two at least.

        These are the oldest, and the one that has not taken part for longest.
        """
        others = [row for row in rows if row.num_uncomputed and row.request.tenant in shares.large]
        num_sure = min(2, len(others))
        for row in rows:
            if row.request.tenant in shares.small:
                self._take_in(step, row, min(row.num_uncomputed, self._prefill_chunk, step.budget - len(others)))
        oldest = min(others, key=lambda r: r.serial, default=None)
        others.sort(key=lambda r: (r is not oldest, self._last_step_of.get(r, 0), r.serial))
        for place, row in enumerate(others):
            num_behind = len(others) - place - 1  # a token is left for each
            wanted = min(row.num_uncomputed, self._prefill_chunk, step.budget - num_behind)
            if wanted <= 0:
                continue
            # The oldest has its turn in every step: its prompt must not take the others'.
            seconds = step.others_s / 2 if row is oldest and len(others) > 1 else step.others_s
            num_tokens = self.step_times.num_tokens_within(seconds, wanted)
            least = min(wanted, MIN_LIMITED_TOKENS)
            if num_tokens < wanted:
                self.form = StepForm.LIMITED
            if num_tokens < least and place >= num_sure:
                continue
            self._take_in(step, row, max(num_tokens, least))
            step.others_s -= self.step_times.of_one_more_row(step.num_tokens_of.get(row, 0))

    def _schedule_waiting(self, step: StepDraft, shares: Shares) -> None:
        num_kept = len(self._places.kept) if shares.entitled != shares.tenants else 0
        num_tokens = self.step_times.num_tokens_within(step.others_s, step.budget)
        if num_tokens < step.budget and self.waiting and len(self.running) < self._places.max_rows:
            self.form = StepForm.LIMITED
            least = min(step.budget, MIN_LIMITED_TOKENS)
            if num_tokens < least and any(row.request.tenant in shares.large for row in self.running):
                return
            num_tokens = max(num_tokens, least)
        self._admit(step, num_tokens, self.waiting, num_kept=num_kept)

    def _remember(self, step: StepDraft, shares: Shares) -> None:
        """The small tenants that take part, how much of the client's text it is that they have computed, and how long
        that would take by itself.
        """
        seen: dict[str, int | None] = {}
        shapes: dict[str, tuple[int, int]] = {}  # rows and tokens
        for row, num_tokens in step.num_tokens_of.items():
            self._last_step_of[row] = self._num_steps
            tenant = row.request.tenant
            if tenant in shares.calm:
                is_first = row.num_computed < row.num_prompt_tokens
                seen[tenant] = num_tokens if is_first else seen.get(tenant)
                num_rows, num_before = shapes.get(tenant, (0, 0))
                shapes[tenant] = num_rows + 1, num_before + num_tokens
        for tenant, num_first_tokens in seen.items():
            self._caution.saw(tenant, num_first_tokens, self.step_times.of(*shapes[tenant]))

    def _schedule_chunk(self, step: StepDraft) -> None:
        """One chunk of the row that has client tokens to compute (one at a time runs), else of the next that waits."""
        for row in self.running:
            if row.num_computed < row.num_prompt_tokens:
                self._take_in(step, row, self._chunk_of(row))
                return
        # Two rows that push each other out while they compute their chunks would keep all others from decoding, and so
        # would rows that end with their chunk and are followed by others without an end.
        may_admit = self._num_admitted < len(self.running) and not self._owes_decode_step
        if not self.running or may_admit:
            for row in self._places.admissible(step.budget, self.waiting):
                step.add(row, self._chunk_of(row))
                self._num_admitted += len(self.running) > 1  # alone, it keeps nobody from decoding
                return

    def _schedule_decodes(self, step: StepDraft) -> None:
        self._owes_decode_step = False
        self._num_admitted = 0
        for row in sorted(self.running, key=lambda r: r.serial):
            if row.num_computed >= row.num_prompt_tokens:
                self._take_in(step, row, min(row.num_uncomputed, 1))

    def _chunk_of(self, row: Row) -> int:
        """Up to the next bound of a chunk, or to the end of the client's tokens."""
        bound = (row.num_computed // self._prefill_chunk + 1) * self._prefill_chunk
        return min(bound, row.num_prompt_tokens) - row.num_computed

    def _take_in(self, step: StepDraft, row: Row, num_tokens: int) -> None:
        num_preemptions = self.num_preemptions
        self._places.take_in(step, row, num_tokens)
        if self.num_preemptions > num_preemptions:
            self._owes_decode_step = True
