"""The outputs of one request's rows on their way from the engine's thread to the handler that waits for them.

A `RowStream` lives on the event loop's thread alone: the runtime hands it a step's outputs there. It refuses to know
what the outputs become. A reader that falls behind finds its rows' outputs merged, at most a few a row, so that a slow
client costs memory for the text that its own request may produce and for nothing else.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from server.engine.request import RowOutput
from server.errors import PromptmuxError

# Unread outputs a row, on average, before they are merged.
MAX_PENDING_PER_ROW = 16


def merge_outputs(outputs: Sequence[RowOutput]) -> list[RowOutput]:
    """One output a row: texts joined, tokens appended, the end of the row kept. Rows stay in order of arrival."""
    if len(outputs) == 1:
        return [outputs[0]]
    by_row: dict[str, list[RowOutput]] = {}
    for output in outputs:
        by_row.setdefault(output.row_id, []).append(output)
    return [_merge_row(parts) for parts in by_row.values()]


def _merge_row(parts: list[RowOutput]) -> RowOutput:
    last = parts[-1]
    if len(parts) == 1:
        return last
    return RowOutput(
        row_id=last.row_id,
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        queue_s=next((part.queue_s for part in parts if part.queue_s is not None), None),
        num_cached=sum(part.num_cached for part in parts),
    )


class RowStream:
    """Outputs of the rows of one request. Only the event loop's thread may touch it.

    `cancel` is called once, with the rows that have not ended, when the stream is closed early; `on_end` is called
    once when the last row ended or the stream was closed, whichever is first.
    """

    def __init__(
        self,
        row_ids: Sequence[str],
        *,
        cancel: Callable[[Iterable[str]], None],
        on_end: Callable[["RowStream"], None],
    ) -> None:
        self.row_ids = tuple(row_ids)
        self._running: set[str] = set(row_ids)
        self._pending: list[RowOutput] = []
        self._changed = asyncio.Event()
        self._cancel = cancel
        self._on_end = on_end
        self._has_ended = False
        self.is_closed = False

    @property
    def is_finished(self) -> bool:
        """Nothing more will come: every row has ended and was read, or the stream was closed."""
        return self.is_closed or (not self._running and not self._pending)

    @property
    def num_pending(self) -> int:
        """Unread outputs held; bounded by `MAX_PENDING_PER_ROW` a row."""
        return len(self._pending)

    def push(self, output: RowOutput) -> bool:
        """Adds one output. False when the row has ended already or the stream is closed: the output is dropped."""
        if self.is_closed or output.row_id not in self._running:
            return False
        if len(self._pending) >= MAX_PENDING_PER_ROW * len(self.row_ids):
            self._pending = merge_outputs(self._pending)
        self._pending.append(output)
        if output.is_last:
            self._running.discard(output.row_id)
            if not self._running:
                self._end()
        self._changed.set()
        return True

    def fail(self, error: PromptmuxError) -> None:
        """Ends every row that has not ended with `error`."""
        for row_id in sorted(self._running):
            self.push(RowOutput(row_id=row_id, error=error))

    async def read(self, timeout_s: float | None = None) -> list[RowOutput]:
        """All that came since the last read, one output a row.

        Waits until there is something; empty after `timeout_s` of silence, or when the stream is finished.
        """
        if not self._pending and not self.is_finished:
            self._changed.clear()
            # Once a token: a timer that wakes the reader costs a third of `asyncio.timeout`.
            timer = None
            if timeout_s is not None:
                timer = asyncio.get_running_loop().call_later(timeout_s, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        outputs, self._pending = self._pending, []
        return merge_outputs(outputs)

    def close(self) -> None:
        """Cancels the rows that have not ended, drops what was not read, and wakes the reader. May be called twice."""
        if self.is_closed:
            return
        self.is_closed = True
        self._pending = []
        if self._running:
            self._cancel(tuple(self._running))
            self._running.clear()
        self._end()
        self._changed.set()

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._on_end(self)
