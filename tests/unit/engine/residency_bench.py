"""A residency over a real backbone with a store that is a dictionary, driven without threads."""

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KvPool
from server.engine.prefix import Prefix, PromptLoader
from server.engine.request import PromptRef
from server.engine.residency import PrefixResidency
from server.metrics import Metrics
from tests.unit.engine.prompts import make_prompt, make_ref


def serve_what_was_asked(loader: PromptLoader) -> None:
    """Do the loader thread's work on this one: everything asked for is ready afterwards."""
    loader._wanted.put(None)
    loader._run()


class Bench:
    """A residency with `prefix_pages` and a store that is a dictionary; answers that are exceptions are raised."""

    def __init__(self, backbone: Backbone, *, prefix_pages: int = 24) -> None:
        self.backbone = backbone
        self.metrics = Metrics()
        self.answers: dict[str, SoftPrompt | Exception] = {}
        self.loads: list[str] = []
        self.next_serial = 1000
        self.pool = KvPool(
            backbone.layers, row_pages=4, prefix_pages=prefix_pages, dtype=backbone.dtype, device=backbone.device,
            poison_freed=True,
        )  # fmt: skip
        self.residency = PrefixResidency(
            backbone,
            self.pool,
            EngineConfig(prefix_cache_bytes=prefix_pages * self.pool.page_bytes),
            self.metrics,
            load_prompt=self._load,
            wake=lambda: None,
            next_serial=self._serial,
        )

    def add(self, key: str, *, k: int = 3, kind: str = "embeddings", seed: int = 0) -> PromptRef:
        ref = make_ref(key, k=k, kind=kind)
        self.answers[ref.prefix_key] = make_prompt(self.backbone, ref, seed=seed)
        return ref

    def arrive(self) -> list[PromptRef]:
        """Let everything asked for arrive; returns what failed."""
        serve_what_was_asked(self.residency.loader)
        return [loaded.ref for loaded in self.residency.poll()[0]]

    def bring(self, *refs: PromptRef) -> None:
        for ref in refs:
            self.residency.bring(ref)
        assert self.arrive() == []
        assert self.residency.compile_wanted(60.0) == []

    def compile(self, ref: PromptRef, prompt: SoftPrompt) -> Prefix | None:
        """Make the prefix of a prompt that has just come; raises what the rows that wait for it would be told."""
        self.residency.host.put(ref.prefix_key, prompt)
        self.residency.bring(ref)
        for _, error in self.residency.compile_wanted(60.0):
            raise error
        prefix = self.residency.device.acquire(ref.prefix_key)
        if prefix is not None:
            self.residency.device.release(prefix)
        return prefix

    def assert_nothing_is_left(self) -> None:
        self.pool.check_invariants()
        assert (self.pool.ledger.num_used, self.pool.num_prefix_pages) == (0, 0)
        assert (len(self.residency.device), self.residency.device.num_bytes) == (0, 0)

    def where(self, *refs: PromptRef) -> list[str]:
        return [self.residency.residency_of(ref.prefix_key) for ref in refs]

    def count(self, metric: str, tier: str) -> float:
        return self.metrics.registry.get_sample_value(f"promptmux_{metric}", {"tier": tier}) or 0.0

    def _load(self, ref: PromptRef) -> SoftPrompt:
        self.loads.append(ref.prefix_key)
        answer = self.answers[ref.prefix_key]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _serial(self) -> int:
        self.next_serial += 1
        return self.next_serial
