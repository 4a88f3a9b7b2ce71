"""Counts what one request used while its rows run.

Owns the request's own numbers (tokens, time to the first token, how rows ended), for its access line and for the
numbers of its tasks. Refuses to know Prometheus: the latencies of rows are the engine's to publish.
"""

import time
from collections.abc import Callable

from server.engine.request import FINISH_CANCELLED, FINISH_ERROR, PromptRef, RowOutput
from server.runtime.generation import Generation
from server.runtime.stats import TaskKey, TaskStatsTable, TaskUse


class RequestMeter:
    """One request's numbers. The event loop's thread alone uses it."""

    def __init__(
        self, generation: Generation, *, arrived_at_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._generation = generation
        self._clock = clock
        self._arrived_at_s = arrived_at_s
        self._row_index = {row.row_id: index for index, row in enumerate(generation.rows)}
        self._completion_tokens = [0] * len(generation.rows)
        self._finish_reasons: list[str | None] = [None] * len(generation.rows)
        self._first_token_s: list[float | None] = [None] * len(generation.rows)
        self._queue_s: list[float | None] = [None] * len(generation.rows)
        self.cached_tokens = 0
        """Of the client's tokens, those whose keys and values were kept from earlier rows."""
        self.e2e_s: float | None = None

    @property
    def tenant(self) -> str:
        return self._generation.tenant

    @property
    def completion_tokens(self) -> int:
        return sum(self._completion_tokens)

    @property
    def queue_s(self) -> float | None:
        """From the rows' submission to the admission of the first of them."""
        return min((waited for waited in self._queue_s if waited is not None), default=None)

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival to the first token of any row."""
        return min((first for first in self._first_token_s if first is not None), default=None)

    @property
    def finish_reason(self) -> str | None:
        """How the rows ended if they agree, else the distinct reasons joined by commas; None while one runs."""
        if any(reason is None for reason in self._finish_reasons):
            return None
        return ",".join(sorted({reason for reason in self._finish_reasons if reason is not None}))

    def observe(self, output: RowOutput) -> None:
        index = self._row_index[output.row_id]
        if output.token_ids:
            self._completion_tokens[index] += len(output.token_ids)
            if self._first_token_s[index] is None:
                self._first_token_s[index] = self._clock() - self._arrived_at_s
        if index % self._generation.n == 0:  # the samples of one item have one text, which usage counts once
            self.cached_tokens += output.num_cached
        if output.queue_s is not None:
            self._queue_s[index] = output.queue_s
        if output.is_last:
            self._finish_reasons[index] = FINISH_ERROR if output.error is not None else output.finish_reason

    def finish(self, table: TaskStatsTable) -> None:
        """Called once, when the last row has ended or the client has gone: adds the request to its tasks' numbers."""
        self.e2e_s = self._clock() - self._arrived_at_s
        self._finish_reasons = [reason or FINISH_CANCELLED for reason in self._finish_reasons]
        items_of_task: dict[TaskKey, list[int]] = {}
        for index, item in enumerate(self._generation.items):
            if item.prompt is not None:
                key = (self._generation.tenant, item.prompt.tenant, item.prompt.task)
                items_of_task.setdefault(key, []).append(index)
        for key, items in items_of_task.items():
            table.add(key, self._use_of(items, self.e2e_s))

    def use_by_prompt(self) -> list[tuple[PromptRef | None, TaskUse]]:
        """What each distinct prompt of a finished request was used for; None is the bare backbone."""
        assert self.e2e_s is not None, "the request has not ended"
        items_of_prompt: dict[PromptRef | None, list[int]] = {}
        for index, item in enumerate(self._generation.items):
            items_of_prompt.setdefault(item.prompt, []).append(index)
        return [(prompt, self._use_of(items, self.e2e_s)) for prompt, items in items_of_prompt.items()]

    def _use_of(self, items: list[int], e2e_s: float) -> TaskUse:
        n = self._generation.n
        rows = [item * n + sample for item in items for sample in range(n)]
        return TaskUse(
            rows=len(rows),
            prompt_tokens=sum(len(self._generation.items[item].token_ids) for item in items),
            completion_tokens=sum(self._completion_tokens[row] for row in rows),
            finish_reasons=tuple(self._finish_reasons[row] or FINISH_CANCELLED for row in rows),
            ttft_s=min((first for row in rows if (first := self._first_token_s[row]) is not None), default=None),
            e2e_s=e2e_s,
        )
