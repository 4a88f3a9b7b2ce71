"""What prompts become on the device, and where each of them is: device, host, or only in the store.

A prefix is the keys and values of one prompt for every layer. It is made once (`residency`: one forward pass of the k
vectors, or a cast of trained keys and values), never changed, and shared by every row that holds it. The device tier
evicts by bytes, least recently used first, never a prefix that a row holds or a task has pinned. The host
tier keeps what the store gave, so that an evicted prefix comes back without the disk. Loading runs on a thread of its
own; only the engine thread touches the tiers.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal

from prompt_store.manifest import SoftPrompt
from server.engine.kv import KvPool, StackedColumns, num_pages_for
from server.engine.pages import SHARED, PageNumbers
from server.engine.request import PromptRef
from server.errors import PromptmuxError, UnavailableError
from server.metrics import Metrics

Residency = Literal["device", "host", "store"]


@dataclass(slots=True, eq=False)
class Prefix:
    """A prompt on the device: full pages that its rows share, and the last `k % PAGE_SIZE` columns, which they copy.

    `uid` is unique in the process; pages that begin with a copied tail are stamped with it.
    """

    uid: int
    key: str
    digest: str
    pages: PageNumbers
    tail: StackedColumns | None
    num_bytes: int
    num_users: int = 0
    is_alive: bool = True
    """False once its prompt was deleted, or it was evicted: rows that hold it still read it."""


class PrefixCache:
    """The device tier: prefixes in the pool's part for them, never more than `max_bytes`."""

    def __init__(self, pool: KvPool, max_bytes: int, metrics: Metrics) -> None:
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._closed: frozenset[str] = frozenset()
        self._pool = pool
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._next_uid = 1
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, key: str) -> bool:
        return key in self._prefixes

    @property
    def num_users(self) -> int:
        """Rows that hold one of these prefixes, those evicted under them not counted."""
        return sum(prefix.num_users for prefix in self._prefixes.values())

    def bytes_for(self, num_virtual_tokens: int) -> int:
        """What making a prefix of so many virtual tokens may take: whole pages, the last one only while it is made."""
        return num_pages_for(num_virtual_tokens) * self._pool.page_bytes

    def acquire(self, key: str) -> Prefix | None:
        """The prefix with one more user, or None when it is not on the device or is to go (`close_for`)."""
        prefix = self._prefixes.get(key)
        if prefix is None or key in self._closed:
            return None
        self._prefixes.move_to_end(key)
        prefix.num_users += 1
        return prefix

    def release(self, prefix: Prefix) -> None:
        if prefix.num_users < 1:
            raise RuntimeError(f"prefix {prefix.digest[:12]} is released more often than acquired")
        prefix.num_users -= 1
        if prefix.num_users == 0 and not prefix.is_alive:
            self._forget(prefix)

    def make_room(self, num_virtual_tokens: int) -> bool:
        """Evict what nobody uses, least recently used first, until a prefix of this size fits.

        False, and nothing is evicted, when even that would not make room.
        """
        if not self.can_make_room(num_virtual_tokens):
            return False
        pages, num_bytes = num_pages_for(num_virtual_tokens), self.bytes_for(num_virtual_tokens)
        for prefix in self._idle():
            if self._fits(pages, num_bytes):
                break
            del self._prefixes[prefix.key]
            prefix.is_alive = False
            self._forget(prefix)
            self._metrics.prompt_cache_evictions_total.labels(tier="device").inc()
        return True

    def can_make_room(self, num_virtual_tokens: int, *, spared: Container[str] = ()) -> bool:
        """Whether `make_room` would succeed, and leave those with the keys `spared`."""
        idle = [prefix for prefix in self._idle() if prefix.key not in spared]
        pages = num_pages_for(num_virtual_tokens) - sum(len(prefix.pages) for prefix in idle)
        return self._fits(pages, self.bytes_for(num_virtual_tokens) - sum(prefix.num_bytes for prefix in idle))

    def close_for(self, num_virtual_tokens: int) -> None:
        """Take no new users for as many prefixes as must go before one of this size fits: idle ones first, then the
        least recently acquired. Pinned ones stay.

        Their users end one by one, so `make_room` succeeds in the end, however many rows ask for what is resident.
        """
        pages, num_bytes = num_pages_for(num_virtual_tokens), self.bytes_for(num_virtual_tokens)
        closed: list[str] = []
        candidates = [prefix for key, prefix in self._prefixes.items() if key not in self._pinned]
        for prefix in sorted(candidates, key=lambda p: p.num_users > 0):
            if self._fits(pages, num_bytes):
                break
            closed.append(prefix.key)
            pages -= len(prefix.pages)
            num_bytes -= prefix.num_bytes
        self._closed = frozenset(closed)

    def reopen(self) -> None:
        """End what `close_for` began."""
        self._closed = frozenset()

    def insert(self, ref: PromptRef, pages: PageNumbers, tail: StackedColumns | None) -> Prefix:
        """Take over shared pages that hold the prompt's full pages, and its tail."""
        if ref.prefix_key in self._prefixes:
            raise RuntimeError(f"prefix {ref.digest[:12]} is compiled twice")
        num_bytes = len(pages) * self._pool.page_bytes + (tail.num_bytes if tail is not None else 0)
        prefix = Prefix(self._next_uid, ref.prefix_key, ref.digest, pages, tail, num_bytes)
        self._next_uid += 1
        self._prefixes[prefix.key] = prefix
        self.num_bytes += num_bytes
        return prefix

    def pin(self, keys: frozenset[str]) -> None:
        self._pinned = keys

    def evict(self, key: str) -> None:
        """Forget a prefix whose version was deleted; rows that hold it keep it to their end."""
        prefix = self._prefixes.pop(key, None)
        if prefix is not None:
            prefix.is_alive = False
            if prefix.num_users == 0:
                self._forget(prefix)

    def check_invariants(self) -> None:
        """Raises RuntimeError when the bytes do not add up or a key names another's prefix."""
        for key, prefix in self._prefixes.items():
            if prefix.key != key or not prefix.is_alive or prefix.num_users < 0:
                raise RuntimeError(f"prefix {prefix.digest[:12]} is filed under the wrong key or is dead")
        if self.num_bytes < sum(prefix.num_bytes for prefix in self._prefixes.values()):
            raise RuntimeError("the device tier has lost count of its bytes")
        if self.num_bytes > self._max_bytes:
            raise RuntimeError(f"the device tier holds {self.num_bytes} bytes, {self._max_bytes} are allowed")
        if self._pool.num_prefix_pages < sum(len(prefix.pages) for prefix in self._prefixes.values()):
            raise RuntimeError("the device tier has lost count of its pages")

    def _idle(self) -> list[Prefix]:
        """Those that may be evicted, least recently used first."""
        return [p for key, p in self._prefixes.items() if p.num_users == 0 and key not in self._pinned]

    def _fits(self, pages: int, num_bytes: int) -> bool:
        return (
            self.num_bytes + num_bytes <= self._max_bytes
            and self._pool.num_prefix_pages + pages <= self._pool.prefix_pages
        )

    def _forget(self, prefix: Prefix) -> None:
        self._pool.release_prefix(prefix.pages, SHARED)
        self.num_bytes -= prefix.num_bytes


@dataclass(frozen=True, slots=True)
class LoadedPrompt:
    """What the loader brings back: the numbers of a prompt, or the reason why there are none."""

    ref: PromptRef
    prompt: SoftPrompt | None
    error: PromptmuxError | None
    for_audit: bool


class PromptLoader:
    """Reads prompts from the store on a thread of its own, one at a time, and hands them over in `poll`.

    `load_prompt` verifies the digest and may raise PromptmuxError; anything else it raises becomes an UnavailableError.
    `wake` is called from the loader thread whenever something is ready.
    """

    def __init__(self, load_prompt: Callable[[PromptRef], SoftPrompt], wake: Callable[[], None]) -> None:
        self._load_prompt = load_prompt
        self._wake = wake
        self._wanted: queue.SimpleQueue[tuple[PromptRef, bool] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[LoadedPrompt] = queue.SimpleQueue()
        self._pending: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="prompt-loader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def num_pending(self) -> int:
        """Prompts asked for, not for audits, that `poll` has not given yet."""
        return len(self._pending)

    def request(self, ref: PromptRef) -> None:
        """Ask for a prompt; asking again while it is on its way does nothing."""
        if ref.prefix_key not in self._pending:
            self._pending.add(ref.prefix_key)
            self._wanted.put((ref, False))

    def request_for_audit(self, ref: PromptRef) -> None:
        """Ask for a prompt past every cache: an audit must not trust what the engine holds."""
        self._wanted.put((ref, True))

    def poll(self) -> list[LoadedPrompt]:
        """What has come since the last call."""
        ready = []
        while not self._ready.empty():
            loaded = self._ready.get()
            if not loaded.for_audit:
                self._pending.discard(loaded.ref.prefix_key)
            ready.append(loaded)
        return ready

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            ref, for_audit = wanted
            try:
                loaded = LoadedPrompt(ref, self._load_prompt(ref), None, for_audit)
            except PromptmuxError as error:
                loaded = LoadedPrompt(ref, None, error, for_audit)
            except Exception as error:
                reason = UnavailableError(f"the prompt of {ref.task}@{ref.version} could not be loaded: {error}")
                loaded = LoadedPrompt(ref, None, reason, for_audit)
            self._ready.put(loaded)
            self._wake()


class HostCache:
    """The host tier: prompts as the store gave them, least recently used out first."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._prompts: OrderedDict[str, SoftPrompt] = OrderedDict()
        self._max_bytes = max_bytes
        self._metrics = metrics
        self.num_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._prompts

    def get(self, key: str) -> SoftPrompt | None:
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: str, prompt: SoftPrompt) -> None:
        self.discard(key)
        self._prompts[key] = prompt
        self.num_bytes += prompt.values.nbytes
        while self.num_bytes > self._max_bytes and len(self._prompts) > 1:
            _, oldest = self._prompts.popitem(last=False)
            self.num_bytes -= oldest.values.nbytes
            self._metrics.prompt_cache_evictions_total.labels(tier="host").inc()

    def discard(self, key: str) -> None:
        prompt = self._prompts.pop(key, None)
        if prompt is not None:
            self.num_bytes -= prompt.values.nbytes

    def check_invariants(self) -> None:
        """Raises RuntimeError when the bytes do not add up, or more than one prompt is over the limit."""
        if self.num_bytes != sum(prompt.values.nbytes for prompt in self._prompts.values()):
            raise RuntimeError("the host tier has lost count of its bytes")
        if self.num_bytes > self._max_bytes and len(self._prompts) > 1:
            raise RuntimeError(f"the host tier holds {self.num_bytes} bytes, {self._max_bytes} are allowed")
