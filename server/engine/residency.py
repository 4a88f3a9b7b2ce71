"""Brings prompts onto the device and keeps count of where each is: the one place where a prefix is made.

A prompt of input embeddings is compiled: one forward pass of its k vectors, alone in its batch, whose keys and values
are then the prefix. Alone, because the bits of a prefix must be a function of prompt and backbone and of nothing that
happened to share the batch; an evicted prefix that is compiled again is the same prefix. Trained keys and values are
cast and used as they are.
"""

import logging
import time
from collections.abc import Callable, Sequence

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
from server.errors import IsolationError, NumericalError, PromptMismatchError, PromptmuxError
from server.metrics import Metrics

logger = logging.getLogger(__name__)


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
        self._wanted: dict[str, PromptRef] = {}  # to be compiled, in the order in which rows asked
        self._arrived: dict[str, SoftPrompt] = {}  # what the loader brought for rows that wait
        self._asked_at_s: dict[str, float] = {}

    def residency_of(self, key: str) -> Residency:
        if key in self.device:
            return "device"
        return "host" if key in self.host else "store"

    def prefetch(self, ref: PromptRef) -> None:
        """Count where the prompt of a new row was found, and start bringing it if it was nowhere."""
        on_device = ref.prefix_key in self.device
        self._count(on_device, "device")
        if not on_device:
            on_host = ref.prefix_key in self.host
            self._count(on_host, "host")
            if not on_host and ref.prefix_key not in self._arrived:
                self._asked_at_s.setdefault(ref.prefix_key, time.monotonic())
                self.loader.request(ref)

    def acquire(self, ref: PromptRef) -> Prefix | None:
        """The row's prefix, or None: then it is on its way, and `poll` and `compile_wanted` bring it."""
        prefix = self.device.acquire(ref.prefix_key)
        if prefix is None:
            self.bring(ref)
        return prefix

    def bring(self, ref: PromptRef) -> None:
        """Start bringing a prompt to the device from wherever it is; nothing is done when it is there already."""
        if ref.prefix_key in self.device:
            return
        self._asked_at_s.setdefault(ref.prefix_key, time.monotonic())
        prompt = self._arrived.get(ref.prefix_key) or self.host.get(ref.prefix_key)
        if prompt is None:
            self.loader.request(ref)
        else:
            self._arrived[ref.prefix_key] = prompt
            self._wanted.setdefault(ref.prefix_key, ref)

    def poll(self) -> tuple[list[LoadedPrompt], list[LoadedPrompt]]:
        """Take in what the loader brought. Returns what failed to load, and what was loaded for audits."""
        failed, for_audit = [], []
        for loaded in self.loader.poll():
            if loaded.for_audit:
                for_audit.append(loaded)
            elif loaded.prompt is None:
                self._asked_at_s.pop(loaded.ref.prefix_key, None)
                failed.append(loaded)
            else:
                self.host.put(loaded.ref.prefix_key, loaded.prompt)
                self._arrived[loaded.ref.prefix_key] = loaded.prompt
                self._wanted.setdefault(loaded.ref.prefix_key, loaded.ref)
        return failed, for_audit

    @property
    def num_wanted(self) -> int:
        return len(self._wanted)

    def compile_wanted(self, limit_s: float) -> list[tuple[PromptRef, PromptmuxError]]:
        """Make prefixes that rows wait for: at least one, and more until `limit_s` have passed.

        One for which there is no room keeps waiting, until rows that hold others have ended. Returns those that cannot
        be made, with the reason.
        """
        failed: list[tuple[PromptRef, PromptmuxError]] = []
        began_s = time.monotonic()
        num_made = 0
        for key, ref in list(self._wanted.items()):
            if num_made and time.monotonic() - began_s >= limit_s:
                break
            try:
                prefix = self.compile(ref, self._arrived[key])
            except PromptmuxError as error:
                failed.append((ref, error))
            else:
                if prefix is None:
                    continue
            num_made += 1
            del self._wanted[key], self._arrived[key]
            asked_at_s = self._asked_at_s.pop(key, None)
            if key in self.device and asked_at_s is not None:
                self._metrics.prompt_load_seconds.observe(time.monotonic() - asked_at_s)
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
        self.device.pin(frozenset(ref.prefix_key for ref in taken))
        for ref in taken:
            self.bring(ref)

    def evict(self, key: str) -> None:
        """Forget a deleted version in every tier."""
        self.device.evict(key)
        self.host.discard(key)
        self._wanted.pop(key, None)
        self._arrived.pop(key, None)
        self._asked_at_s.pop(key, None)

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
                self._pool.write(pages, self._cast(prompt))
            else:
                self._compile_embeddings(serial, pages, prompt)
            columns = self._pool.read(pages, k)
            if not columns.is_finite():
                raise NumericalError(
                    f"the prefix of {ref.task}@{ref.version} is not finite in {self._backbone.dtype_name}"
                )
            for index in range(num_full):
                self._pool.ledger.share(int(pages[index]), serial, content_of_prefix(ref.prefix_key, index))
        except BaseException:
            self._pool.release_prefix(pages, serial)
            raise
        self._pool.release_prefix(pages[num_full:], serial)
        tail = columns.columns(num_full * PAGE_SIZE, k).clone() if k % PAGE_SIZE else None
        return self.device.insert(ref, pages[:num_full], tail)

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
            raise IsolationError(f"compiling a prompt: {violation.reason}")
        self._backbone.forward(self._pool, plan)

    def _count(self, hit: bool, tier: str) -> None:
        counter = self._metrics.prompt_cache_hits_total if hit else self._metrics.prompt_cache_misses_total
        counter.labels(tier=tier).inc()
