"""Prompts come to the device as the model itself would compute them, from whichever tier they are in."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.kv import KvPool
from server.engine.pages import NO_CONTENT, PAGE_SIZE, SHARED, content_of_prefix
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.prefix import Prefix
from server.errors import (
    IsolationError,
    NumericalError,
    PromptCorruptError,
    PromptMismatchError,
    UnavailableError,
)
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.residency_bench import Bench, serve_what_was_asked


def own_keys_values(backbone: Backbone, vectors: np.ndarray) -> list[torch.Tensor]:
    """What the model's own attention and cache make of the vectors: keys of all layers, then values."""
    cache = DynamicCache()
    embeds = torch.from_numpy(vectors).unsqueeze(0)
    with torch.inference_mode(), backbone._stock_attention():
        backbone.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    layers = [cache.layers[i] for i in range(len(backbone.layers))]
    return [layer.keys[0] for layer in layers] + [layer.values[0] for layer in layers]  # type: ignore[union-attr,index]


def tensors_of(pool: KvPool, prefix: Prefix | None) -> list[torch.Tensor]:
    """Copies of all the prefix's columns, from its pages and its tail: keys of all layers, then values."""
    assert prefix is not None
    full = pool.read(prefix.pages, len(prefix.pages) * PAGE_SIZE).by_layer()
    tail = prefix.tail.by_layer() if prefix.tail is not None else None
    tails = [*tail.keys, *tail.values] if tail is not None else []
    parts = [*full.keys, *full.values]
    return [torch.cat([part, tails[i]], dim=1) if tails else part for i, part in enumerate(parts)]


def assert_equal(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor], tolerance: float = 0.0) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= tolerance


@pytest.mark.parametrize("k", [1, 5, 16, 32, 130])
def test_compiled_embeddings_are_what_the_model_itself_keeps_of_them(llama: Backbone, k: int) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=k)
    prompt = make_prompt(llama, ref, seed=0)
    compiled = bench.compile(ref, prompt)
    assert_equal(tensors_of(bench.pool, compiled), own_keys_values(llama, prompt.values), tolerance=2e-5)


@pytest.mark.parametrize("k", [4, 16, 37])
def test_trained_keys_and_values_are_taken_as_they_are(llama: Backbone, k: int) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=k, kind="prefix")
    prompt = make_prompt(llama, ref, seed=1)
    keys_then_values = [torch.from_numpy(prompt.values[layer, which]) for which in (0, 1) for layer in range(3)]
    assert_equal(tensors_of(bench.pool, bench.compile(ref, prompt)), keys_then_values)


@pytest.mark.parametrize("kind", ["embeddings", "prefix"])
@pytest.mark.parametrize("k", [5, 32, 37])
def test_full_pages_are_shared_under_the_prompts_content_and_the_tail_is_no_page(
    llama: Backbone, kind: str, k: int
) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=k, kind=kind)
    prefix = bench.compile(ref, make_prompt(llama, ref, seed=1))
    assert prefix is not None
    ledger = bench.pool.ledger
    num_full = k // PAGE_SIZE
    assert ledger.content[prefix.pages].tolist() == [content_of_prefix(ref.prefix_key, i) for i in range(num_full)]
    assert ledger.owner[prefix.pages].tolist() == [SHARED] * num_full
    assert (ledger.num_used, bench.pool.num_prefix_pages) == (num_full, num_full), "the last page was given back"
    assert (prefix.tail.num_tokens if prefix.tail is not None else 0) == k % PAGE_SIZE
    assert bench.residency.device.num_bytes == k * llama.bytes_per_token


def test_prompt_compiled_again_has_the_same_bits_whatever_lies_in_memory(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=23)
    prompt = make_prompt(llama, ref, seed=2)
    old = bench.compile(ref, prompt)
    assert old is not None
    first, places = tensors_of(bench.pool, old), old.pages.tolist()
    bench.residency.evict(ref.prefix_key)
    other = bench.pool.allocate(1, 3)
    assert other is not None
    for tensor in (*bench.pool.key_pages, *bench.pool.value_pages):
        tensor.fill_(1e4)
    again = bench.compile(ref, prompt)
    assert again is not None
    assert again.pages.tolist() != places
    assert_equal(tensors_of(bench.pool, again), first)


@pytest.mark.parametrize("kind", ["embeddings", "prefix"])
@pytest.mark.parametrize("k", [3, 40])
def test_prompt_that_is_not_finite_is_refused_and_its_pages_given_back(llama: Backbone, kind: str, k: int) -> None:
    bench = Bench(llama)
    ref = bench.add("a", kind=kind, k=k)
    prompt = make_prompt(llama, ref, seed=0)
    prompt.values[-1] = np.nan
    with pytest.raises(NumericalError, match="task-a@1 is not finite"):
        bench.compile(ref, prompt)
    bench.assert_nothing_is_left()


def test_plan_that_fails_its_check_compiles_nothing_and_gives_the_pages_back(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_wrong_plan(entries: Sequence[PlanEntry]) -> tuple[StepPlan, list[int]]:
        plan, order = build_plan(entries)
        plan.write_slots[0] += PAGE_SIZE
        return plan, order

    bench = Bench(llama)
    ref = bench.add("a", k=20)
    monkeypatch.setattr("server.engine.prefix_maker.build_plan", build_wrong_plan)
    with pytest.raises(IsolationError, match="it would write into another row's page"):
        bench.compile(ref, make_prompt(llama, ref, seed=0))
    bench.assert_nothing_is_left()


def test_pass_that_fails_gives_the_pages_back(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    bench = Bench(llama)
    ref = bench.add("a", k=20)
    monkeypatch.setattr(llama, "forward", fail)
    with pytest.raises(UnavailableError, match="out of memory"):
        bench.compile(ref, make_prompt(llama, ref, seed=0))
    bench.assert_nothing_is_left()


def test_failure_while_pages_are_being_shared_gives_back_those_too(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(llama)
    ref = bench.add("a", k=40)
    shared: list[int] = []
    share = bench.pool.ledger.share

    def fail_at_the_second(page: int, owner: int, content: int) -> None:
        if shared:
            raise RuntimeError("no more")
        share(page, owner, content)
        shared.append(page)

    monkeypatch.setattr(bench.pool.ledger, "share", fail_at_the_second)
    with pytest.raises(UnavailableError, match="no more"):
        bench.compile(ref, make_prompt(llama, ref, seed=0))
    assert shared
    bench.assert_nothing_is_left()


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
        bench.compile(fitting, prompt)
    bench.assert_nothing_is_left()


def test_prompt_of_another_kind_than_its_reference_is_refused(llama: Backbone) -> None:
    bench = Bench(llama)
    prompt = make_prompt(llama, make_ref("a", kind="prefix"), seed=0)
    with pytest.raises(PromptMismatchError, match="was to have 3 embeddings"):
        bench.compile(make_ref("a", kind="embeddings"), prompt)


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
    bench = Bench(llama, prefix_pages=1)
    one, other = bench.add("a", seed=1), bench.add("b", seed=2)
    bench.bring(one)
    first = bench.residency.acquire(one)
    assert first is not None
    bits = tensors_of(bench.pool, first)
    bench.residency.device.release(first)
    bench.bring(other)
    assert bench.where(one, other) == ["host", "device"]
    assert bench.residency.acquire(one) is None
    assert bench.residency.compile_wanted(60.0) == []
    again = bench.residency.acquire(one)
    assert again is not None
    assert again.uid != first.uid
    assert_equal(tensors_of(bench.pool, again), bits)
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
    held, waiting = bench.add("a", k=20), bench.add("b")
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
    assert bench.residency.device.num_bytes == prefix.num_bytes == 20 * llama.bytes_per_token
    assert bench.pool.ledger.owner[prefix.pages].tolist() == [SHARED]
    bench.residency.device.release(prefix)
    assert bench.pool.ledger.content[prefix.pages].tolist() == [NO_CONTENT]
    bench.assert_nothing_is_left()


def test_prompt_read_for_an_audit_enters_no_tier(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a")
    bench.residency.loader.request_for_audit(ref)
    serve_what_was_asked(bench.residency.loader)
    failed, for_audit = bench.residency.poll()
    assert failed == []
    assert [loaded.ref for loaded in for_audit] == [ref]
    assert (bench.where(ref), bench.residency.num_wanted) == (["store"], 0)


def test_prefix_without_room_waits_until_the_rows_that_hold_others_have_ended(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=2)
    held, waiting = bench.add("a", k=20), bench.add("b", k=20)
    bench.bring(held)
    prefix = bench.residency.acquire(held)
    assert prefix is not None
    bench.bring(waiting)
    assert bench.where(held, waiting) == ["device", "host"]
    assert bench.residency.num_wanted == 1
    assert bench.residency.acquire(waiting) is None
    bench.residency.device.release(prefix)
    assert bench.residency.compile_wanted(0.0) == []
    assert bench.where(held, waiting) == ["host", "device"]
    assert bench.residency.num_wanted == 0
    assert bench.loads == [held.prefix_key, waiting.prefix_key]


def test_pinned_prompts_are_brought_and_fill_at_most_half_of_the_memory(
    llama: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(llama, prefix_pages=8)
    refs = [bench.add(key, k=16) for key in "abcdef"]
    bench.residency.pin(refs)
    bench.arrive()
    assert bench.residency.compile_wanted(60.0) == []
    assert bench.where(*refs) == ["device"] * 4 + ["store"] * 2
    assert "4 of 6 pinned prompts stay on the device" in caplog.text
    others = [bench.add(f"other-{i}", k=64) for i in range(3)]
    for other in others:
        bench.bring(other)
    assert bench.where(*refs) == ["device"] * 4 + ["store"] * 2
    assert bench.where(*others) == ["host", "host", "device"]
    bench.residency.pin([])
    bench.bring(others[0])
    assert bench.where(*refs) == ["host"] * 4 + ["store"] * 2, "pinned no more, they are the least recently used"


def test_prompt_on_the_device_is_not_brought_again(llama: Backbone) -> None:
    bench = Bench(llama)
    ref = bench.add("a")
    bench.bring(ref)
    bench.bring(ref)
    bench.residency.pin([ref])
    assert bench.residency.num_wanted == 0
    assert bench.loads == [ref.prefix_key]
