"""Brings prompts onto the device and keeps count of where each is: which are made when, and what goes for them.

Refuses to know how a prefix is computed (`server.engine.prefix_maker`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KvPool, num_pages_for
from server.engine.pages import PAGE_SIZE
from server.engine.prefix import HostCache, LoadedPrompt, Prefix, PrefixCache, PromptLoader, Residency
from server.engine.prefix_maker import MadePrefix, PrefixMaker
from server.engine.request import PromptRef
from server.errors import PromptmuxError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_LOADING = 16
"""Prompts that are being read from the store at a time."""

MAX_COLUMNS_A_PASS = 160
"""Columns of prompts that are compiled in one pass: with 20 a prompt, eight of them cost less than half of what they
cost one by one, and more would save little and hold up running rows."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A prompt that is on its way to the device. Its numbers are in the host tier, once they have come."""

    ref: PromptRef
    asked_at_s: float


class PrefixResidency:
    """The three tiers together. The engine thread alone calls it, but for `residency_of`."""

    def __init__(
        self,
        backbone: Backbone,
        pool: KvPool,
        config: EngineConfig,
        metrics: Metrics,
        *,
        load_prompt: Callable[[PromptRef], SoftPrompt],
        wake: Callable[[], None],
        next_serial: Callable[[], int],
    ) -> None:
        self.device = PrefixCache(pool, config.prefix_cache_bytes, metrics)
        self.host = HostCache(config.host_prompt_bytes, metrics)
        self.loader = PromptLoader(load_prompt, wake)
        self._maker = PrefixMaker(
            backbone, pool, metrics, max_virtual_tokens=config.max_virtual_tokens, next_serial=next_serial
        )
        self._max_pinned_bytes = config.prefix_cache_bytes // 2
        self._metrics = metrics
        self._wanted: dict[str, _Wanted] = {}  # in the order of asking
        self._pinned: frozenset[str] = frozenset()
        self._owed: str | None = None  # the first of those for which there was no room
        self._max_prefetched = 2 * config.max_rows

    def residency_of(self, key: str) -> Residency:
        if key in self.device:
            return "device"
        return "host" if key in self.host else "store"

    def prefetch(self, ref: PromptRef) -> None:
        """Count where the prompt of a new row was found, and start bringing it, unless very many are being brought."""
        on_device = ref.prefix_key in self.device
        self._count(on_device, "device")
        if not on_device:
            self._count(ref.prefix_key in self.host, "host")
            if len(self._wanted) < self._max_prefetched:
                self.bring(ref)

    def acquire(self, ref: PromptRef) -> Prefix | None:
        """The row's prefix, or None: it is on its way (`poll` and `compile_wanted` bring it), or has to go to make
        room, and comes back after that.
        """
        prefix = self.device.acquire(ref.prefix_key)
        if prefix is None:
            self.bring(ref)
        return prefix

    def bring(self, ref: PromptRef) -> None:
        """Start bringing a prompt to the device from wherever it is; nothing is done when it is there already."""
        key = ref.prefix_key
        if key not in self.device and key not in self._wanted:
            self._wanted[key] = _Wanted(ref, time.monotonic())
            if key not in self.host and self._owed is None:
                self._request(ref)

    def poll(self) -> tuple[list[LoadedPrompt], list[LoadedPrompt]]:
        """Take in what the loader brought. Returns what failed to load, and what was loaded for audits."""
        failed, for_audit = [], []
        for loaded in self.loader.poll():
            if loaded.for_audit:
                for_audit.append(loaded)
            elif loaded.prompt is None:
                self._drop_wanted(loaded.ref.prefix_key)
                failed.append(loaded)
            else:
                self.host.put(loaded.ref.prefix_key, loaded.prompt)
        return failed, for_audit

    @property
    def num_wanted(self) -> int:
        """Prompts that are on their way to the device."""
        return len(self._wanted)

    def keep_wanted(self, keys: Container[str]) -> None:
        """Bring none but these, for which rows wait, and pinned ones: the rows of the others have ended."""
        for key in list(self._wanted):
            if key not in keys and key not in self._pinned:
                self._drop_wanted(key)

    def compile_wanted(self, limit_s: float) -> list[tuple[PromptRef, PromptmuxError]]:
        """Make prefixes of prompts that have arrived, in the order of asking: some, and more until `limit_s` have
        passed. None of them takes the room of another. Returns those that cannot be made, with the reason.

        The first for which there is no room is owed it. Until it is made nothing else is, or small prompts would take
        every page that becomes free; and some of the prefixes in its way take no new rows (`PrefixCache.close_for`).
        """
        failed: list[tuple[PromptRef, PromptmuxError]] = []
        began_s = time.monotonic()
        done: set[str] = set()
        queue = deque(self._in_order())
        while group := self._next_group(queue, done, failed):
            prompts = [(wanted.ref, prompt) for wanted, prompt in group]
            self.device.make_room(sum(num_pages_for(prompt.num_virtual_tokens) for _, prompt in prompts) * PAGE_SIZE)
            for (wanted, _), made in zip(group, self._maker.make_all(prompts), strict=True):
                if isinstance(made, MadePrefix):
                    self.device.insert(made.ref, made.pages, made.tail)
                    self._metrics.prompt_load_seconds.observe(time.monotonic() - wanted.asked_at_s)
                else:
                    failed.append((wanted.ref, made))
                done.add(wanted.ref.prefix_key)
                self._drop_wanted(wanted.ref.prefix_key)
            if time.monotonic() - began_s >= limit_s:
                break
        return failed

    def pin(self, refs: Sequence[PromptRef]) -> None:
        """Keep exactly these prompts on the device, in this order, as far as half of its bytes go, and bring them."""
        taken: list[PromptRef] = []
        num_bytes = 0
        for ref in refs:
            num_bytes += self.device.bytes_for(ref.num_virtual_tokens)
            if num_bytes > self._max_pinned_bytes:
                logger.warning(
                    "%d of %d pinned prompts stay on the device: they may fill half of prefix_cache_bytes",
                    len(taken), len(refs),
                )  # fmt: skip
                break
            taken.append(ref)
        self._pinned = frozenset(ref.prefix_key for ref in taken)
        self.device.pin(self._pinned)
        for ref in taken:
            self.bring(ref)

    def evict(self, key: str) -> None:
        """Forget a deleted version in every tier."""
        self.device.evict(key)
        self.host.discard(key)
        self._drop_wanted(key)

    def check_invariants(self) -> None:
        """Raises RuntimeError when a tier contradicts itself, or room is owed to a prompt that nobody wants."""
        self.device.check_invariants()
        self.host.check_invariants()
        if self._owed is not None and self._owed not in self._wanted:
            raise RuntimeError("room is owed to a prompt that is not wanted")

    def _next_group(
        self,
        queue: deque[tuple[str, _Wanted]],
        done: Container[str],
        failed: list[tuple[PromptRef, PromptmuxError]],
    ) -> list[tuple[_Wanted, SoftPrompt]]:
        """Take from the queue what is made next, in one pass: there is room for it that spares what is `done`.

        What cannot fit the backbone goes to `failed`. Empty when nothing else can be made in this turn.
        """
        group: list[tuple[_Wanted, SoftPrompt]] = []
        num_columns = 0  # of whole pages
        while queue:
            key, wanted = queue[0]
            prompt = self.host.get(key)
            if prompt is None:
                # It is on its way, or has been pushed out of the host tier.
                self._request(wanted.ref)
                if key == self._owed:
                    queue.clear()
                else:
                    queue.popleft()
                continue
            if group and not self._may_join(group, num_columns, prompt):
                break
            try:
                self._maker.require_fit(wanted.ref, prompt)
            except PromptmuxError as error:
                failed.append((wanted.ref, error))
                self._drop_wanted(key)
                queue.popleft()
                continue
            num_columns += num_pages_for(prompt.num_virtual_tokens) * PAGE_SIZE
            # What was made just now is for rows that take it in this turn.
            if not self.device.can_make_room(num_columns, spared=done):
                if not group and not done:
                    self._owed = key
                    self.device.close_for(prompt.num_virtual_tokens)
                queue.clear()
                break
            group.append((wanted, prompt))
            queue.popleft()
        return group

    def _may_join(self, group: Sequence[tuple[_Wanted, SoftPrompt]], num_columns: int, prompt: SoftPrompt) -> bool:
        return (
            num_columns + prompt.num_virtual_tokens <= MAX_COLUMNS_A_PASS
            and self._maker.can_share_pass(prompt)
            and self._maker.can_share_pass(group[0][1])
        )

    def _in_order(self) -> list[tuple[str, "_Wanted"]]:
        """What is wanted, in the order of asking; the one that is owed room before all others."""
        return sorted(self._wanted.items(), key=lambda item: item[0] != self._owed)

    def _request(self, ref: PromptRef) -> None:
        """Have it loaded, now or in a later turn: what is loaded too far ahead pushes itself out of the host tier."""
        if self.loader.num_pending < MAX_LOADING:
            self.loader.request(ref)

    def _drop_wanted(self, key: str) -> None:
        self._wanted.pop(key, None)
        if key == self._owed:
            self._owed = None
            self.device.reopen()

    def _count(self, hit: bool, tier: str) -> None:
        counter = self._metrics.prompt_cache_hits_total if hit else self._metrics.prompt_cache_misses_total
        counter.labels(tier=tier).inc()
