"""Packed and dense passes over random schedules, compared with a plain transformers model on each row alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
from server.engine.forward import DenseForward, Forward, PackedForward, UnsupportedModelError, embed, reference_logits
from server.engine.kv import KeysValues, KvCache
from server.engine.plan import PlanEntry, build_plan
from server.engine.slots import SlotLedger
from tests.factories import NUM_LAYERS, VOCAB_SIZE, load_model

FolderOf = Callable[[str], Path]

PACKED = ("llama", "mistral", "gemma2", "gpt2", "gpt_oss", "opt")
DENSE = ("gptj", "bloom", "falcon", "llama", "mistral", "gemma2")
ROWS = (20, 1, 9, 6)
# Rows 0 and 2 decode in one step, with 15 and 8 tokens behind them.
CUTS = ((13, 14, 15, 16, 20), (1,), (8, 9), (2, 6))


def make_packed(folder: Path) -> PackedForward:
    model, context = load_model(folder), StepContext()
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    return PackedForward(model, context)


def make_dense(folder: Path) -> DenseForward:
    return DenseForward(load_model(folder))


def random_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def run_schedule(
    forward: Forward, rows: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]], vectors: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Run each row in chunks that end at its cuts, row i beginning with step i. Returns all logits of each row.

    `vectors [VOCAB_SIZE, hidden_size]` take the place of the token ids in every other row.
    """
    ledger = SlotLedger(max_tokens=256, budget_tokens=8192, slab_tokens=1024, max_slots_per_slab=4)
    kv = KvCache(forward.layers, ledger, dtype=torch.float32, device=torch.device("cpu"), poison_freed=True)
    for owner in range(100, 104):
        # What was here before must not be seen.
        before = kv.allocate(owner, 20)
        assert before is not None
        kv.free(before, before.capacity)
    slots = [kv.allocate(i + 1, 200 if i == 1 else 20) for i in range(len(rows))]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for step in range(max(i + len(c) for i, c in enumerate(cuts))):
        entries, who = [], []
        for i, (row, ends, slot) in enumerate(zip(rows, cuts, slots, strict=True)):
            if 0 <= step - i < len(ends):
                assert slot is not None
                ids = row[done[i] : ends[step - i]]
                given_vectors = vectors[torch.tensor(ids)] if vectors is not None and i % 2 else None
                entries.append(PlanEntry(slot, done[i], ids, 0, given_vectors))
                who.append(i)
                done[i] = ends[step - i]
        plan, order = build_plan(entries)
        logits = forward.run(kv, plan)
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
    ledger = SlotLedger(max_tokens=128, budget_tokens=1024, slab_tokens=1024, max_slots_per_slab=8)
    kv = KvCache(forward.layers, ledger, dtype=torch.float32, device=torch.device("cpu"))
    rows, entries = [random_tokens(5, seed) for seed in range(3)], []
    for owner, (row, logits_from) in enumerate(zip(rows, (4, 5, 2), strict=True)):
        slot = kv.allocate(owner + 1, 5)
        assert slot is not None
        entries.append(PlanEntry(slot, 0, row, logits_from))
    plan, _ = build_plan(entries)
    with torch.inference_mode():
        found = forward.run(kv, plan)
    expected = torch.cat([alone(plain, rows[0])[4:], alone(plain, rows[2])[2:]])

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gptj"])
def test_step_that_wants_no_logits_still_fills_the_slot(tiny_backbone_folder: FolderOf, family: str) -> None:
    folder = tiny_backbone_folder(family)
    forward: Forward = make_dense(folder) if family == "gptj" else make_packed(folder)
    row = random_tokens(6, 0)
    ledger = SlotLedger(max_tokens=128, budget_tokens=1024, slab_tokens=1024, max_slots_per_slab=8)
    kv = KvCache(forward.layers, ledger, dtype=torch.float32, device=torch.device("cpu"))
    slot = kv.allocate(1, 6)
    assert slot is not None
    with torch.inference_mode():
        nothing = forward.run(kv, build_plan([PlanEntry(slot, 0, row[:5], logits_from=5)])[0])
        last = forward.run(kv, build_plan([PlanEntry(slot, 5, row[5:], logits_from=0)])[0])

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


def test_packed_row_with_a_copied_prefix_is_the_model_with_the_tokens_in_front(tiny_backbone_folder: FolderOf) -> None:
    folder = tiny_backbone_folder("llama")
    forward, plain = make_packed(folder), load_model(folder)
    prompt, row = random_tokens(5, 1), random_tokens(7, 2)
    ledger = SlotLedger(max_tokens=128, budget_tokens=1024, slab_tokens=1024, max_slots_per_slab=8)
    kv = KvCache(forward.layers, ledger, dtype=torch.float32, device=torch.device("cpu"))
    slot = kv.allocate(1, 12)
    assert slot is not None
    kv.copy_in(slot, keys_and_values(plain, prompt), prefix_uid=1)
    with torch.inference_mode():
        found = forward.run(kv, build_plan([PlanEntry(slot, 5, row, 0)])[0])

    torch.testing.assert_close(found, alone(plain, [*prompt, *row])[5:], atol=1e-4, rtol=1e-4)


def test_both_ways_discover_the_same_layers(tiny_backbone_folder: FolderOf) -> None:
    folder = tiny_backbone_folder("gemma2")

    assert make_packed(folder).layers == make_dense(folder).layers
    assert len(make_packed(folder).layers) == NUM_LAYERS


def test_model_that_never_calls_the_attention_function_is_refused(tiny_backbone_folder: FolderOf) -> None:
    model = load_model(tiny_backbone_folder("llama"))
    with pytest.raises(UnsupportedModelError, match="never calls"):
        PackedForward(model, StepContext())


def test_model_whose_layers_share_one_module_is_refused(tiny_backbone_folder: FolderOf) -> None:
    model, context = load_model(tiny_backbone_folder("llama")), StepContext()
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
    ledger = SlotLedger(max_tokens=128, budget_tokens=1024, slab_tokens=1024, max_slots_per_slab=8)
    kv = KvCache(forward.layers, ledger, dtype=torch.float32, device=torch.device("cpu"))
    slot = kv.allocate(1, 4)
    assert slot is not None
    row = random_tokens(4, 0)
    plan, _ = build_plan([PlanEntry(slot, 0, row, 0)])
    plan.logits_tokens[0] = 99
    with pytest.raises(IndexError):
        forward.run(kv, plan)
    with pytest.raises(RuntimeError, match="without a plan"):
        forward._model(torch.tensor([row]))
    with torch.inference_mode():
        found = forward.run(kv, build_plan([PlanEntry(slot, 0, row, 0)])[0])

    expected = alone(load_model(tiny_backbone_folder("llama")), row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
