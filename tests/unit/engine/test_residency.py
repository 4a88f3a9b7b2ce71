"""Prompts come to the device as the model itself would compute them, from whichever tier they are in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KeysValues
from server.engine.prefix import PromptLoader
from server.engine.request import PromptRef
from server.engine.residency import PrefixResidency
from server.errors import NumericalError, PromptCorruptError, PromptMismatchError
from server.metrics import Metrics
from tests.unit.engine.prompts import make_prompt, make_ref


def serve_what_was_asked(loader: PromptLoader) -> None:
    """Do the loader thread's work on this one: everything asked for is ready afterwards."""
    loader._wanted.put(None)
    loader._run()


class Bench:
    """A residency with small memory and a store that is a dictionary; answers that are exceptions are raised."""

    def __init__(self, backbone: Backbone, **config: Any) -> None:
        self.backbone = backbone
        self.metrics = Metrics()
        self.answers: dict[str, SoftPrompt | Exception] = {}
        self.loads: list[str] = []
        self.next_serial = 1000
        self.residency = PrefixResidency(
            backbone,
            EngineConfig(poison_freed_slots=True, **config),
            self.metrics,
            load_prompt=self._load,
            wake=lambda: None,
            next_serial=self._serial,
        )
        self.scratch = self.residency._scratch

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


def own_keys_values(backbone: Backbone, vectors: np.ndarray) -> list[torch.Tensor]:
    """What the model's own attention and cache make of the vectors: keys of all layers, then values."""
    cache = DynamicCache()
    embeds = torch.from_numpy(vectors).unsqueeze(0)
    with torch.inference_mode(), backbone._stock_attention():
        backbone.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    layers = [cache.layers[i] for i in range(len(backbone.layers))]
    return [layer.keys[0] for layer in layers] + [layer.values[0] for layer in layers]  # type: ignore[union-attr,index]


def tensors_of(prefix: KeysValues | None) -> list[torch.Tensor]:
    assert prefix is not None
    return [*prefix.keys, *prefix.values]


def assert_equal(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor], tolerance: float = 0.0) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= tolerance


@pytest.mark.parametrize("k", [1, 5, 130])
def test_compiled_embeddings_are_what_the_model_itself_keeps_of_them(llama: Backbone, k: int) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=k)
    prompt = make_prompt(llama, ref, seed=0)
    compiled = bench.residency.compile(ref, prompt)
    assert_equal(tensors_of(compiled), own_keys_values(llama, prompt.values), tolerance=2e-5)
    assert bench.scratch.ledger.num_slots_used == 0, "the slot it was compiled in is given back"


def test_trained_keys_and_values_are_taken_as_they_are(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=4, kind="prefix")
    prompt = make_prompt(llama, ref, seed=1)
    keys_then_values = [torch.from_numpy(prompt.values[layer, which]) for which in (0, 1) for layer in range(3)]
    assert_equal(tensors_of(bench.residency.compile(ref, prompt)), keys_then_values)


def test_prompt_compiled_again_has_the_same_bits_whatever_lies_in_memory(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=7)
    prompt = make_prompt(llama, ref, seed=2)
    first = tensors_of(bench.residency.compile(ref, prompt))
    other = bench.scratch.allocate(1, 100)
    assert other is not None
    for tensor in (*bench.scratch.slabs[other.slab].keys, *bench.scratch.slabs[other.slab].values):
        tensor[other.index] = 1e4
    assert_equal(tensors_of(bench.residency.compile(ref, prompt)), first)


@pytest.mark.parametrize("kind", ["embeddings", "prefix"])
def test_prompt_that_is_not_finite_is_refused_and_its_slot_given_back(llama: Backbone, kind: str) -> None:
    bench = Bench(llama)
    ref = bench.add("a", kind=kind)
    prompt = make_prompt(llama, ref, seed=0)
    prompt.values[-1] = np.nan
    with pytest.raises(NumericalError, match="task-a@1 is not finite"):
        bench.residency.compile(ref, prompt)
    assert bench.scratch.ledger.num_slots_used == 0


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("embeddings", (4, 32)),
        ("embeddings", (3, 16)),
        ("embeddings", (300, 32)),
        ("prefix", (3, 2, 2, 4, 8)),
        ("prefix", (2, 2, 2, 3, 8)),
        ("prefix", (3, 2, 1, 3, 8)),
        ("prefix", (3, 2, 2, 3, 4)),
    ],
)
def test_prompt_of_another_shape_is_refused(llama: Backbone, kind: str, shape: tuple[int, ...]) -> None:
    bench = Bench(llama)
    fitting = make_ref("a", k=300 if shape[0] == 300 else 3, kind=kind)
    prompt = SoftPrompt(kind=kind, values=np.zeros(shape, dtype=np.float32))  # type: ignore[arg-type]
    with pytest.raises(PromptMismatchError, match="task-a@1"):
        bench.residency.compile(fitting, prompt)


def test_prompt_of_another_kind_than_its_reference_is_refused(llama: Backbone) -> None:
    bench = Bench(llama)
    prompt = make_prompt(llama, make_ref("a", kind="prefix"), seed=0)
    with pytest.raises(PromptMismatchError, match="was to have 3 embeddings"):
        bench.residency.compile(make_ref("a", kind="embeddings"), prompt)


def test_prompt_goes_from_store_to_host_to_device_and_hits_and_misses_are_counted(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a")
    bench.residency.prefetch(ref)
    assert bench.where(ref) == ["store"]
    assert bench.residency.acquire(ref) is None
    assert bench.arrive() == []
    assert bench.where(ref) == ["host"]
    assert bench.residency.num_wanted == 1
    assert bench.residency.compile_wanted(60.0) == []
    assert bench.where(ref) == ["device"]
    prefix = bench.residency.acquire(ref)
    assert prefix is not None
    assert (prefix.key, prefix.digest, prefix.num_users) == (ref.prefix_key, ref.digest, 1)
    assert bench.loads == [ref.prefix_key], "asked for twice while it was on its way, read once"
    bench.residency.prefetch(ref)
    assert (bench.count("prompt_cache_misses_total", "device"), bench.count("prompt_cache_hits_total", "device")) == (
        1,
        1,
    )
    assert (bench.count("prompt_cache_misses_total", "host"), bench.count("prompt_cache_hits_total", "host")) == (1, 0)


def test_evicted_prefix_comes_back_from_the_host_without_the_store(llama: Backbone) -> None:
    bench = Bench(llama, prefix_cache_bytes=4 * llama.bytes_per_token)
    one, other = bench.add("a", seed=1), bench.add("b", seed=2)
    bench.bring(one)
    first = bench.residency.acquire(one)
    assert first is not None
    bench.residency.device.release(first)
    bench.bring(other)
    assert bench.where(one, other) == ["host", "device"]
    assert bench.residency.acquire(one) is None
    assert bench.residency.compile_wanted(60.0) == []
    again = bench.residency.acquire(one)
    assert again is not None
    assert again.uid != first.uid
    assert_equal(tensors_of(again.tensors), tensors_of(first.tensors))
    assert bench.loads == [one.prefix_key, other.prefix_key]


def test_one_prefix_is_made_however_short_the_time_first_asked_first_made(llama: Backbone) -> None:
    bench = Bench(llama)
    refs = [bench.add(key) for key in "abc"]
    for ref in refs:
        bench.residency.bring(ref)
    bench.arrive()
    assert bench.residency.compile_wanted(0.0) == []
    assert bench.where(*refs) == ["device", "host", "host"]
    assert bench.residency.num_wanted == 2
    assert bench.residency.compile_wanted(60.0) == []
    assert bench.where(*refs) == ["device"] * 3


def test_prompt_that_cannot_be_made_is_reported_and_the_others_are_made(llama: Backbone) -> None:
    bench = Bench(llama)
    bad, good = bench.add("bad"), bench.add("good")
    bench.answers[bad.prefix_key] = make_prompt(llama, make_ref("bad", k=9), seed=0)
    for ref in (bad, good):
        bench.residency.bring(ref)
    bench.arrive()
    ((failed, error),) = bench.residency.compile_wanted(60.0)
    assert failed is bad
    assert isinstance(error, PromptMismatchError)
    assert bench.where(good) == ["device"]
    assert bench.residency.num_wanted == 0


def test_failed_load_is_reported_and_may_be_asked_for_again(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a")
    sound, bench.answers[ref.prefix_key] = bench.answers[ref.prefix_key], PromptCorruptError("digest differs")
    bench.residency.bring(ref)
    assert bench.arrive() == [ref]
    assert (bench.where(ref), bench.residency.num_wanted) == (["store"], 0)
    bench.answers[ref.prefix_key] = sound
    bench.bring(ref)
    assert bench.where(ref) == ["device"]


def test_deleted_prompt_is_forgotten_in_every_tier_but_kept_by_the_row_that_holds_it(llama: Backbone) -> None:
    bench = Bench(llama)
    held, waiting = bench.add("a"), bench.add("b")
    bench.bring(held)
    prefix = bench.residency.acquire(held)
    bench.residency.bring(waiting)
    bench.arrive()
    for ref in (held, waiting):
        bench.residency.evict(ref.prefix_key)
    assert bench.where(held, waiting) == ["store", "store"]
    assert bench.residency.num_wanted == 0
    assert prefix is not None
    assert not prefix.is_alive
    assert bench.residency.device.num_bytes == prefix.tensors.num_bytes
    bench.residency.device.release(prefix)
    assert bench.residency.device.num_bytes == 0


def test_prompt_read_for_an_audit_enters_no_tier(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a")
    bench.residency.loader.request_for_audit(ref)
    serve_what_was_asked(bench.residency.loader)
    failed, for_audit = bench.residency.poll()
    assert failed == []
    assert [loaded.ref for loaded in for_audit] == [ref]
    assert (bench.where(ref), bench.residency.num_wanted) == (["store"], 0)
