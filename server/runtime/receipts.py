"""Receipts: which prompt answered which request, written down behind the requests' backs.

Owns the queue between the requests and the disk, and the thread that empties it: many receipts a transaction, so that
a busy server pays for few of them. A request never waits for its receipt and never fails by it: what does not fit the
queue, and what the disk does not take, is counted and logged. Refuses to know HTTP.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import structlog

from prompt_store.errors import PromptStoreError
from prompt_store.manifest import Receipt
from prompt_store.store import PromptStore
from server.metrics import Metrics
from server.runtime.meter import RequestMeter

MAX_QUEUED = 20_000
MAX_BATCH = 1_000
# How long the first receipt of a batch waits for others.
LINGER_S = 0.2
MAX_OUTCOME_CHARS = 200

_log = structlog.get_logger("promptmux.receipts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOrigin:
    """Whose request it is: the id by which a canary decides and receipts are found, the key, and the route."""

    request_id: str
    key_id: str | None
    endpoint: str


def make_receipts(meter: RequestMeter, origin: RequestOrigin) -> list[Receipt]:
    """One for each prompt of a request that has ended."""
    now = datetime.now(UTC)
    return [
        Receipt(
            at=now,
            request_id=origin.request_id,
            tenant=meter.tenant,
            key_id=origin.key_id,
            endpoint=origin.endpoint,
            owner=prompt.tenant if prompt is not None else None,
            task=prompt.task if prompt is not None else None,
            version=prompt.version if prompt is not None else None,
            digest=prompt.digest if prompt is not None else None,
            num_rows=use.rows,
            prompt_tokens=use.prompt_tokens,
            completion_tokens=use.completion_tokens,
            outcome=",".join(sorted(set(use.finish_reasons)))[:MAX_OUTCOME_CHARS],
        )
        for prompt, use in meter.use_by_prompt()
    ]


class ReceiptWriter:
    """One thread that writes receipts in groups. All methods may be called from any thread.

    `max_rows` receipts are kept, the newest; 0 writes none.
    """

    def __init__(
        self,
        store: PromptStore,
        metrics: Metrics,
        *,
        max_rows: int,
        max_queued: int = MAX_QUEUED,
        linger_s: float = LINGER_S,
    ) -> None:
        self._store = store
        self._total = metrics.receipts_total
        self._max_rows = max_rows
        self._max_queued = max_queued
        self._linger_s = linger_s
        self._queue: deque[Receipt] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_dropping = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="promptmux-receipts", daemon=True)

    def start(self) -> None:
        if self._max_rows > 0:
            self._thread.start()

    def put(self, receipts: Sequence[Receipt]) -> None:
        """Queue them; those for which there is no room, or no time any more, are dropped."""
        if self._max_rows == 0 or not receipts:
            return
        with self._changed:
            num_free = 0 if self._is_stopping else max(self._max_queued - len(self._queue), 0)
            self._queue.extend(receipts[:num_free])
            num_dropped = len(receipts) - min(num_free, len(receipts))
            begins_to_drop = num_dropped > 0 and not self._is_dropping
            self._is_dropping = num_dropped > 0
            self._changed.notify_all()
        if num_dropped:
            self._total.labels(result="dropped").inc(num_dropped)
        if begins_to_drop:
            _log.error("receipts_dropped", num_queued=self._max_queued)

    def stop(self, timeout_s: float) -> None:
        """Write what is queued and end the thread. May be called twice."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._store.append_receipts(batch, max_rows=self._max_rows)
            except PromptStoreError as error:
                self._total.labels(result="failed").inc(len(batch))
                if not self._is_failing:
                    _log.error("receipts_not_written", error=error.message, num_receipts=len(batch))
                self._is_failing = True
            except Exception:
                # The thread outlives what nobody foresaw: the next batch may be fine.
                self._total.labels(result="failed").inc(len(batch))
                _log.exception("receipts_not_written", num_receipts=len(batch))
            else:
                self._total.labels(result="written").inc(len(batch))
                if self._is_failing:
                    _log.info("receipts_written_again")
                self._is_failing = False

    def _next_batch(self) -> list[Receipt]:
        """Waits for receipts; none means that there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._is_stopping)
            self._changed.wait_for(lambda: len(self._queue) >= MAX_BATCH or self._is_stopping, self._linger_s)
            batch = list(islice(self._queue, MAX_BATCH))
            for _ in batch:
                self._queue.popleft()
            return batch
