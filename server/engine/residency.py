"""Brings prompts onto the device and keeps count of where each is: the one place where a prefix is made.

A prompt of input embeddings is compiled: one forward pass of its k vectors, alone in its batch, whose keys and values
are then the prefix. Alone, because the bits of a prefix must be a function of prompt and backbone and of nothing that
happened to share the batch; an evicted prefix that is compiled again is the same prefix. Trained keys and values are
cast and used as they are.
"""

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.isolation import Claim, check_plan
from server.engine.kv import KeysValues, KvPool, num_pages_for
from server.engine.pages import PAGE_SIZE, PageNumbers, content_of_prefix
from server.engine.plan import PlanEntry, build_plan
from server.engine.prefix import HostCache, LoadedPrompt, Prefix, PrefixCache, PromptLoader, Residency
from server.engine.request import PromptRef
from server.engine.row_pages import RowPages
from server.errors import IsolationError, NumericalError, PromptMismatchError, PromptmuxError, UnavailableError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_LOADING = 16
"""Prompts that are being read from the store at a time."""


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
        self._backbone = backbone
        self._pool = pool
        self._max_virtual_tokens = min(config.max_virtual_tokens, backbone.max_model_len)
        self._max_pinned_bytes = config.prefix_cache_bytes // 2
        self._metrics = metrics
        self._next_serial = next_serial
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
        """Make prefixes of prompts that have arrived, in the order of asking: at least one, and more until `limit_s`
        have passed. None of them takes the room of another. Returns those that cannot be made, with the reason.

        The first for which there is no room is owed it. Until it is made nothing else is, or small prompts would take
        every page that becomes free; and some of the prefixes in its way take no new rows (`PrefixCache.close_for`).
        """
        failed: list[tuple[PromptRef, PromptmuxError]] = []
        began_s = time.monotonic()
        done: set[str] = set()
        for key, wanted in self._in_order():
            if done and time.monotonic() - began_s >= limit_s:
                break
            prompt = self.host.get(key)
            if prompt is None:
                # It is on its way, or has been pushed out of the host tier.
                self._request(wanted.ref)
                if key == self._owed:
                    break
                continue
            if done and not self.device.can_make_room(prompt.num_virtual_tokens, spared=done):
                break  # what was made just now is for rows that take it in this turn
            error = None
            try:
                if self.compile(wanted.ref, prompt) is None:
                    self._owed = key
                    self.device.close_for(prompt.num_virtual_tokens)
                    break
                self._metrics.prompt_load_seconds.observe(time.monotonic() - wanted.asked_at_s)
            except PromptmuxError as refused:
                error = refused
            except Exception as fault:
                logger.exception("%s@%s could not be compiled", wanted.ref.task, wanted.ref.version)
                error = UnavailableError(
                    f"the prompt of {wanted.ref.task}@{wanted.ref.version} could not be compiled: {fault}"
                )
            if error is not None:
                failed.append((wanted.ref, error))
            done.add(key)
            self._drop_wanted(key)
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

    def compile(self, ref: PromptRef, prompt: SoftPrompt) -> Prefix | None:
        """Make the prompt's prefix and put it on the device; None when there is no room for it now.

        Raises PromptMismatchError when its shape is not what the reference says or does not fit the backbone,
        NumericalError when it comes out not finite.
        """
        self._require_fit(ref, prompt)
        k = prompt.num_virtual_tokens
        if not self.device.make_room(k):
            return None
        serial = self._next_serial()
        pages = self._pool.allocate_prefix(serial, num_pages_for(k))
        if pages is None:
            raise RuntimeError("the prefixes' part of the pool is full although there was room")
        num_full = k // PAGE_SIZE
        try:
            if prompt.kind == "prefix":
                self._pool.write(pages, self._pool.stack(self._cast(prompt)))
            else:
                self._compile_embeddings(serial, pages, prompt)
            columns = self._pool.read(pages, k)
            if not columns.is_finite():
                raise NumericalError(
                    f"the prefix of {ref.task}@{ref.version} is not finite in {self._backbone.dtype_name}"
                )
            tail = columns.columns(num_full * PAGE_SIZE, k).clone() if k % PAGE_SIZE else None
            for index in range(num_full):
                self._pool.ledger.share(int(pages[index]), serial, content_of_prefix(ref.prefix_key, index))
        except BaseException:
            self._pool.release_prefix(pages, serial)
            raise
        self._pool.release_prefix(pages[num_full:], serial)
        return self.device.insert(ref, pages[:num_full], tail)

    def check_invariants(self) -> None:
        """Raises RuntimeError when a tier contradicts itself, or room is owed to a prompt that nobody wants."""
        self.device.check_invariants()
        self.host.check_invariants()
        if self._owed is not None and self._owed not in self._wanted:
            raise RuntimeError("room is owed to a prompt that is not wanted")

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

    def _require_fit(self, ref: PromptRef, prompt: SoftPrompt) -> None:
        """A prompt that was stored for another backbone must end its own rows, not the step loop."""
        if prompt.kind != ref.kind or prompt.num_virtual_tokens != ref.num_virtual_tokens:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} was to have {ref.num_virtual_tokens} {ref.kind}, "
                f"its file has {prompt.num_virtual_tokens} {prompt.kind}"
            )
        k = prompt.num_virtual_tokens
        if k > self._max_virtual_tokens:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} has {k} virtual tokens; {self._max_virtual_tokens} are allowed"
            )
        shape = self._backbone.shape(k)
        if prompt.kind == "prefix":
            expected: tuple[int | None, ...] = (shape.num_layers, 2, shape.kv_heads, k, shape.head_dim)
        else:
            expected = (k, shape.hidden_size)
        if prompt.values.shape != expected:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} has the shape {prompt.values.shape}, this backbone needs {expected}"
            )

    def _cast(self, prompt: SoftPrompt) -> KeysValues:
        stacked = torch.from_numpy(prompt.values).to(device=self._backbone.device, dtype=self._backbone.dtype)
        return KeysValues(tuple(layer[0] for layer in stacked), tuple(layer[1] for layer in stacked))

    def _compile_embeddings(self, serial: int, pages: PageNumbers, prompt: SoftPrompt) -> None:
        """One forward pass of the prompt's vectors, alone in its batch, into pages that the job owns."""
        k = prompt.num_virtual_tokens
        vectors = torch.from_numpy(np.ascontiguousarray(prompt.values)).to(self._backbone.device)
        placeholders = [0] * k
        own = RowPages(k)
        own.append(pages, self._pool.ledger)
        plan, _ = build_plan([PlanEntry(own.numbers, 0, placeholders, logits_from=k, vectors=vectors)])
        claim = Claim(
            serial=serial, start_column=0, token_ids=placeholders, num_logits=0, pages=own.numbers,
            generations=own.generations, contents=own.contents, vectors=vectors,
        )  # fmt: skip
        for violation in check_plan(plan, [claim], self._pool.ledger):
            self._metrics.isolation_violations_total.inc()
            raise IsolationError(f"compiling a prompt: {violation.reason}")
        self._backbone.forward(self._pool, plan)

    def _count(self, hit: bool, tier: str) -> None:
        counter = self._metrics.prompt_cache_hits_total if hit else self._metrics.prompt_cache_misses_total
        counter.labels(tier=tier).inc()
