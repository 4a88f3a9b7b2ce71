"""Packed and dense passes over random schedules, compared with a plain transformers model on each row alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
from server.engine.forward import DenseForward, Forward, PackedForward, UnsupportedModelError, embed, reference_logits
from server.engine.kernels.gather import gather_attention
from server.engine.kv import KeysValues, KvPool, num_pages_for
from server.engine.pages import PAGE_SIZE, PageNumbers
from server.engine.plan import PlanEntry, build_plan
from tests.factories import NUM_LAYERS, VOCAB_SIZE, load_model

FolderOf = Callable[[str], Path]

PACKED = ("llama", "mistral", "gemma2", "gpt2", "gpt_oss", "opt")
DENSE = ("gptj", "bloom", "falcon", "llama", "mistral", "gemma2")
ROWS = (36, 1, 9, 20)
# Rows 0 and 2 decode in one step, with 16 and 8 tokens behind them. Row 0 crosses two page borders, one of them within
# a chunk; row 3 begins a page with a chunk.
CUTS = ((15, 16, 17, 18, 36), (1,), (8, 9), (16, 20))


def make_packed(folder: Path) -> PackedForward:
    model, context = load_model(folder), StepContext(gather_attention)
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    return PackedForward(model, context)


def make_dense(folder: Path) -> DenseForward:
    return DenseForward(load_model(folder))


def random_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def make_pool(forward: Forward, num_pages: int = 8) -> KvPool:
    return KvPool(
        forward.layers, row_pages=num_pages, prefix_pages=0, dtype=torch.float32, device=torch.device("cpu"),
        poison_freed=True,
    )  # fmt: skip


def take(pool: KvPool, owner: int, count: int) -> PageNumbers:
    pages = pool.allocate(owner, count)
    assert pages is not None
    return pages


@torch.inference_mode()
def run_schedule(
    forward: Forward, rows: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]], vectors: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Run each row in chunks that end at its cuts, row i beginning with step i. Returns all logits of each row.

    `vectors [VOCAB_SIZE, hidden_size]` take the place of the token ids in every other row.
    """
    pool = make_pool(forward, num_pages=24)
    before = take(pool, 100, 20)
    for tensor in (*pool.key_pages, *pool.value_pages):
        tensor[before] = 1e4  # what was here before must not be seen
    pool.release(before[::2], 100)
    pages = [take(pool, i + 1, num_pages_for(len(row)) + (i == 1)) for i, row in enumerate(rows)]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for step in range(max(i + len(c) for i, c in enumerate(cuts))):
        entries, who = [], []
        for i, (row, ends, own) in enumerate(zip(rows, cuts, pages, strict=True)):
            if 0 <= step - i < len(ends):
                ids = row[done[i] : ends[step - i]]
                given_vectors = vectors[torch.tensor(ids)] if vectors is not None and i % 2 else None
                entries.append(PlanEntry(own, done[i], ids, 0, given_vectors))
                who.append(i)
                done[i] = ends[step - i]
        plan, order = build_plan(entries)
        logits = forward.run(pool, plan)
        for packed, original in enumerate(order):
            found[who[original]].append(logits[torch.from_numpy(plan.logits_entries == packed)])
    return [torch.cat(parts) for parts in found]


@torch.inference_mode()
def alone(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


def assert_rows_are_those_alone(
    forward: Forward, plain: PreTrainedModel, rows: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]]
) -> None:
    vectors = embed(plain, torch.arange(VOCAB_SIZE)).detach()
    for found, row in zip(run_schedule(forward, rows, cuts, vectors), rows, strict=True):
        torch.testing.assert_close(found, alone(plain, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_in_chunks_are_the_rows_alone(tiny_backbone_folder: FolderOf, family: str) -> None:
    folder = tiny_backbone_folder(family)
    rows = [random_tokens(length, seed) for seed, length in enumerate(ROWS)]

    assert_rows_are_those_alone(make_packed(folder), load_model(folder), rows, CUTS)


@pytest.mark.parametrize("family", DENSE)
def test_dense_rows_in_chunks_are_the_rows_alone(tiny_backbone_folder: FolderOf, family: str) -> None:
    folder = tiny_backbone_folder(family)
    rows = [random_tokens(length, seed) for seed, length in enumerate(ROWS)]

    assert_rows_are_those_alone(make_dense(folder), load_model(folder), rows, CUTS)


@pytest.mark.parametrize("make", [make_packed, make_dense])
def test_random_schedules(tiny_backbone_folder: FolderOf, make: Callable[[Path], Forward]) -> None:
    folder = tiny_backbone_folder("gemma2")
    forward, plain = make(folder), load_model(folder)
    cuts_of = st.lists(st.integers(1, 24), min_size=1, max_size=5, unique=True).map(sorted)

    @given(st.lists(cuts_of, min_size=1, max_size=4), st.integers(0, 1000))
    @settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
    def check(cuts: list[list[int]], seed: int) -> None:
        rows = [random_tokens(ends[-1], seed + i) for i, ends in enumerate(cuts)]
        assert_rows_are_those_alone(forward, plain, rows, cuts)

    check()


@pytest.mark.parametrize("make", [make_packed, make_dense])
def test_only_the_wanted_logits_are_returned(tiny_backbone_folder: FolderOf, make: Callable[[Path], Forward]) -> None:
    folder = tiny_backbone_folder("llama")
    forward, plain = make(folder), load_model(folder)
    pool = make_pool(forward)
    rows, entries = [random_tokens(5, seed) for seed in range(3)], []
    for owner, (row, logits_from) in enumerate(zip(rows, (4, 5, 2), strict=True)):
        entries.append(PlanEntry(take(pool, owner + 1, 1), 0, row, logits_from))
    plan, _ = build_plan(entries)
    with torch.inference_mode():
        found = forward.run(pool, plan)
    expected = torch.cat([alone(plain, rows[0])[4:], alone(plain, rows[2])[2:]])

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gptj"])
def test_step_that_wants_no_logits_still_fills_the_pages(tiny_backbone_folder: FolderOf, family: str) -> None:
    folder = tiny_backbone_folder(family)
    forward: Forward = make_dense(folder) if family == "gptj" else make_packed(folder)
    row = random_tokens(6, 0)
    pool = make_pool(forward)
    pages = take(pool, 1, 1)
    with torch.inference_mode():
        nothing = forward.run(pool, build_plan([PlanEntry(pages, 0, row[:5], logits_from=5)])[0])
        last = forward.run(pool, build_plan([PlanEntry(pages, 5, row[5:], logits_from=0)])[0])

    assert len(nothing) == 0
    torch.testing.assert_close(last[0], alone(load_model(folder), row)[-1], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def keys_and_values(model: PreTrainedModel, token_ids: Sequence[int]) -> KeysValues:
    cache: Any = DynamicCache()
    model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True)
    layers = cache.layers
    return KeysValues(tuple(layer.keys[0] for layer in layers), tuple(layer.values[0] for layer in layers))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_reference_with_a_prompt_made_of_tokens_is_the_model_with_those_tokens_in_front(
    tiny_backbone_folder: FolderOf, family: str
) -> None:
    model = load_model(tiny_backbone_folder(family))
    prompt, row = random_tokens(5, 1), random_tokens(7, 2)
    expected = alone(model, [*prompt, *row])[5:]
    with torch.inference_mode():
        by_vectors = reference_logits(model, row, vectors=embed(model, torch.tensor(prompt)))
        by_prefix = reference_logits(model, row, prefix=keys_and_values(model, prompt))
        without = reference_logits(model, row)

    torch.testing.assert_close(by_vectors, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_prefix, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without, alone(model, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [5, 16, 21])
@pytest.mark.parametrize("make", [make_packed, make_dense])
def test_rows_behind_one_prefix_are_the_model_with_its_tokens_in_front(
    tiny_backbone_folder: FolderOf, make: Callable[[Path], Forward], k: int
) -> None:
    """Two rows at once share the prefix's full pages and have its last columns in pages of their own."""
    folder = tiny_backbone_folder("llama")
    forward, plain = make(folder), load_model(folder)
    prompt, rows = random_tokens(k, 1), [random_tokens(7, 2), random_tokens(14, 3)]
    num_full = k // PAGE_SIZE
    pool = make_pool(forward)
    columns = pool.stack(keys_and_values(plain, prompt))
    shared = take(pool, 9, num_full)
    pool.write(shared, columns.columns(0, num_full * PAGE_SIZE))
    entries = []
    for serial, row in enumerate(rows, start=1):
        own = take(pool, serial, num_pages_for(k + len(row)) - num_full)
        if k % PAGE_SIZE:
            pool.write_tail(int(own[0]), columns.columns(num_full * PAGE_SIZE, k), serial, prefix_uid=1)
        entries.append(PlanEntry(np.concatenate([shared, own]), k, row, 0))
    before = pool.read(shared, num_full * PAGE_SIZE)
    plan, _ = build_plan(entries)
    with torch.inference_mode():
        found = forward.run(pool, plan)

    expected = torch.cat([alone(plain, [*prompt, *row])[k:] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    after = pool.read(shared, num_full * PAGE_SIZE)
    assert all(torch.equal(one, other) for one, other in zip(before.parts, after.parts, strict=True))


def test_both_ways_discover_the_same_layers(tiny_backbone_folder: FolderOf) -> None:
    folder = tiny_backbone_folder("gemma2")

    assert make_packed(folder).layers == make_dense(folder).layers
    assert len(make_packed(folder).layers) == NUM_LAYERS


def test_model_that_never_calls_the_attention_function_is_refused(tiny_backbone_folder: FolderOf) -> None:
    model = load_model(tiny_backbone_folder("llama"))
    with pytest.raises(UnsupportedModelError, match="never calls"):
        PackedForward(model, StepContext(gather_attention))


def test_model_whose_layers_share_one_module_is_refused(tiny_backbone_folder: FolderOf) -> None:
    model, context = load_model(tiny_backbone_folder("llama")), StepContext(gather_attention)
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(UnsupportedModelError, match="more than once"):
        PackedForward(model, context)


def test_model_with_other_state_than_keys_and_values_is_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="other state"):
        DenseForward(AutoModelForCausalLM.from_config(config).eval())


def test_plan_is_let_go_of_when_a_pass_fails(tiny_backbone_folder: FolderOf) -> None:
    forward = make_packed(tiny_backbone_folder("llama"))
    pool = make_pool(forward)
    pages = take(pool, 1, 1)
    row = random_tokens(4, 0)
    plan, _ = build_plan([PlanEntry(pages, 0, row, 0)])
    plan.logits_tokens[0] = 99
    with pytest.raises(IndexError), torch.inference_mode():
        forward.run(pool, plan)
    with pytest.raises(RuntimeError, match="without a plan"):
        forward._model(torch.tensor([row]))
    with torch.inference_mode():
        found = forward.run(pool, build_plan([PlanEntry(pages, 0, row, 0)])[0])

    expected = alone(load_model(tiny_backbone_folder("llama")), row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
