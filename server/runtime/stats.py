"""Numbers of single tasks, which metric labels must not hold: requests, tokens and latencies.

Owns a bounded table in memory, keyed by who asked and whose task answered; it starts empty with the server. Refuses to
know where the numbers come from.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# Latencies kept a task; percentiles are over these.
WINDOW = 256
MAX_TASKS = 20_000


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in seconds over the last `num_samples` observations; None without any."""

    p50: float | None
    p90: float | None
    p99: float | None
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """A snapshot. Counts run since `since` (Unix time)."""

    since: float
    requests: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    finish_reasons: dict[str, int]
    ttft: Latency
    e2e: Latency


@dataclass(slots=True)
class _Entry:
    requests: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    e2e_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUse:
    """What one request used of one task."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    finish_reasons: tuple[str, ...]
    ttft_s: float | None
    e2e_s: float


TaskKey = tuple[str, str, str]
"""The tenant that asked, the tenant that owns the task, and the task's name."""


class TaskStatsTable:
    """Any thread may use it. The least recently used tasks make room beyond `MAX_TASKS`."""

    def __init__(self) -> None:
        self._since = time.time()
        self._lock = threading.Lock()
        self._entries: OrderedDict[TaskKey, _Entry] = OrderedDict()

    def add(self, key: TaskKey, use: TaskUse) -> None:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            if len(self._entries) > MAX_TASKS:
                self._entries.popitem(last=False)
            entry.requests += 1
            entry.rows += use.rows
            entry.prompt_tokens += use.prompt_tokens
            entry.completion_tokens += use.completion_tokens
            entry.finish_reasons.update(use.finish_reasons)
            if use.ttft_s is not None:
                entry.ttft_s.append(use.ttft_s)
            entry.e2e_s.append(use.e2e_s)

    def get(self, key: TaskKey) -> TaskStats:
        """The task's numbers; all zero when nobody used it."""
        with self._lock:
            entry = self._entries.get(key) or _Entry()
            return TaskStats(
                since=self._since,
                requests=entry.requests,
                rows=entry.rows,
                prompt_tokens=entry.prompt_tokens,
                completion_tokens=entry.completion_tokens,
                finish_reasons=dict(sorted(entry.finish_reasons.items())),
                ttft=_latency(entry.ttft_s),
                e2e=_latency(entry.e2e_s),
            )

    def forget(self, owner: str, task: str) -> None:
        """Drops the numbers of a deleted task, whoever asked."""
        with self._lock:
            for key in [key for key in self._entries if key[1:] == (owner, task)]:
                del self._entries[key]


def _latency(observed: Iterable[float]) -> Latency:
    ordered = sorted(observed)
    if not ordered:
        return Latency(None, None, None, 0)

    def percentile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Latency(percentile(0.5), percentile(0.9), percentile(0.99), len(ordered))
