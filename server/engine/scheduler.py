"""Which rows take part in the next step, and with how many tokens. No torch: tested in milliseconds.

There is one token budget a step and no split between prefill and decode (as in vLLM's v1 scheduler): running rows
come first and keep their place, a row with more than one token to compute gets a chunk, and what is left of the budget
admits waiting rows, tenants in turn. A row is admitted only when a slot for its longest possible length is free, so
that a running row never has to give way.
"""

import enum
from bisect import insort
from collections import OrderedDict
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
        """Rows in the order in which they would be admitted if nothing held any of them back."""
        queues = [list(rows) for rows in self._by_tenant.values()]
        depth = 0
        while True:
            rows = [queue[depth] for queue in queues if depth < len(queue)]
            if not rows:
                return
            yield from rows
            depth += 1

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

    `try_admit(row)` is the engine's: it gives the row its prefix and its slot and says whether it could. A row whose
    prefix is still being loaded delays only itself; one for which there is no room holds those behind it back, since a
    long row would otherwise wait for ever behind short ones. At most `max_cold_prompts` prompts are being brought for
    rows that wait. Not thread-safe: the engine thread owns it.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_step_tokens: int,
        prefill_chunk: int,
        try_admit: Callable[[Row], Admission],
        max_cold_prompts: int | None = None,
    ) -> None:
        if max_step_tokens < max_rows:
            raise ValueError(f"max_step_tokens ({max_step_tokens}) must be at least max_rows ({max_rows})")
        self.waiting = WaitingRows()
        self.running: list[Row] = []
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._prefill_chunk = prefill_chunk
        self._try_admit = try_admit
        self._max_cold_prompts = max_cold_prompts if max_cold_prompts is not None else 2 * max_rows

    def add(self, row: Row) -> None:
        self.waiting.add(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is. The caller frees its slot and its prefix."""
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
        """The rows of the next step. Empty when nothing can run."""
        budget = self._max_step_tokens
        scheduled: list[ScheduledRow] = []
        # Rows that decode first: a long prompt must not push the others' next token out of the step.
        for row in sorted(self.running, key=lambda r: r.num_uncomputed > 1):
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, budget)
            if num_tokens > 0:
                scheduled.append(ScheduledRow(row, num_tokens))
                budget -= num_tokens
        for row in self._admissible(budget):
            num_tokens = min(row.num_uncomputed, self._prefill_chunk, budget)
            scheduled.append(ScheduledRow(row, num_tokens))
            budget -= num_tokens
            if budget <= 0:
                break
        return scheduled

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

    def _admissible(self, budget: int) -> Iterator[Row]:
        if budget <= 0 or len(self.running) >= self._max_rows or not len(self.waiting):
            return
        not_ready: set[str] = set()  # many rows of one cold task count as one
        for row in list(self.waiting):
            prompt = row.request.prompt
            key = prompt.prefix_key if prompt is not None else row.row_id
            if key in not_ready:
                continue
            if len(not_ready) >= self._max_cold_prompts or len(self.running) >= self._max_rows:
                return
            admission = self._try_admit(row)
            if admission is Admission.NO_ROOM:
                return
            if admission is Admission.PREFIX_NOT_READY:
                not_ready.add(key)
                continue
            self.waiting.remove(row)
            row.state = RowState.RUNNING
            self.running.append(row)
            yield row
