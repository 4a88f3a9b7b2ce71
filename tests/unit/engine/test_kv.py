"""Slots hold what was put there, bit for bit, and nothing of whoever had them before."""

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from server.engine.kv import KeysValues, KvCache, LayerShape, SlabTensors
from server.engine.slots import Slot, SlotLedger

LAYERS = (LayerShape(kv_heads=2, key_dim=4, value_dim=4), LayerShape(kv_heads=1, key_dim=6, value_dim=3))
CPU = torch.device("cpu")


def make_cache(*, poison: bool = False, dtype: torch.dtype = torch.float32, budget_tokens: int = 1024) -> KvCache:
    ledger = SlotLedger(max_tokens=256, budget_tokens=budget_tokens, slab_tokens=512, max_slots_per_slab=4)
    return KvCache(LAYERS, ledger, dtype=dtype, device=CPU, poison_freed=poison)


def allocate(cache: KvCache, owner: int, num_tokens: int = 100) -> Slot:
    slot = cache.allocate(owner, num_tokens)
    assert slot is not None
    return slot


def slot_tensors(cache: KvCache, slot: Slot) -> list[torch.Tensor]:
    slab: SlabTensors = cache.slabs[slot.slab]
    return [tensor[slot.index] for tensor in (*slab.keys, *slab.values)]


def fill(cache: KvCache, slot: Slot, columns: slice, value: float) -> None:
    for tensor in slot_tensors(cache, slot):
        tensor[:, columns] = value


def is_all(tensors: Sequence[torch.Tensor], value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in tensors)


def make_prefix(k: int, seed: int, dtype: torch.dtype = torch.float32) -> KeysValues:
    generator = torch.Generator().manual_seed(seed)
    return KeysValues(
        keys=tuple(torch.randn(s.kv_heads, k, s.key_dim, generator=generator).to(dtype) for s in LAYERS),
        values=tuple(torch.randn(s.kv_heads, k, s.value_dim, generator=generator).to(dtype) for s in LAYERS),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(k=st.integers(1, 128), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_prefix_comes_out_as_it_went_in_and_touches_no_other_column(dtype: torch.dtype, k: int, seed: int) -> None:
    cache = make_cache(dtype=dtype)
    neighbour, slot = allocate(cache, 1), allocate(cache, 2)
    prefix = make_prefix(k, seed, dtype)
    cache.copy_in(slot, prefix, prefix_uid=5)
    copied = cache.copy_out(slot, k)
    for one, other in zip((*copied.keys, *copied.values), (*prefix.keys, *prefix.values), strict=True):
        assert torch.equal(one, other)
    assert is_all([tensor[:, k:] for tensor in slot_tensors(cache, slot)], 0.0)
    assert is_all(slot_tensors(cache, neighbour), 0.0)
    assert int(cache.ledger.slabs[slot.slab].prefix_uid[slot.index]) == 5


def test_what_is_copied_out_is_a_copy() -> None:
    cache = make_cache()
    slot = allocate(cache, 1)
    cache.copy_in(slot, make_prefix(3, seed=1), prefix_uid=1)
    copied = cache.copy_out(slot, 3)
    before = copied.keys[0].clone()
    fill(cache, slot, slice(None), 9.0)
    assert torch.equal(copied.keys[0], before)


def test_bytes_of_keys_and_values() -> None:
    prefix = make_prefix(5, seed=0)
    assert prefix.num_tokens == 5
    per_token = KvCache.bytes_per_token(LAYERS, torch.float32)
    assert per_token == 4 * (2 * (4 + 4) + 1 * (6 + 3))
    assert prefix.num_bytes == 5 * per_token


@given(st.lists(st.tuples(st.integers(0, 128), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_slot_is_all_zero_when_it_is_given_out(lives: list[tuple[int, bool]]) -> None:
    cache = make_cache()
    for owner, (num_columns, with_nan) in enumerate(lives, start=1):
        slot = allocate(cache, owner)
        assert is_all(slot_tensors(cache, slot), 0.0)
        fill(cache, slot, slice(0, num_columns), float("nan") if with_nan else float(owner))
        cache.free(slot, num_columns)


def test_poisoned_slot_is_all_nan_while_free_and_all_zero_when_given_out() -> None:
    cache = make_cache(poison=True)
    neighbour, slot = allocate(cache, 1), allocate(cache, 2)
    fill(cache, neighbour, slice(None), 4.0)
    fill(cache, slot, slice(0, 3), 1.0)
    cache.free(slot, 3)
    assert all(bool(tensor.isnan().all()) for tensor in slot_tensors(cache, slot))
    assert is_all(slot_tensors(cache, neighbour), 4.0)
    again = allocate(cache, 3)
    assert (again.slab, again.index) == (slot.slab, slot.index)
    assert is_all(slot_tensors(cache, again), 0.0)


def test_tensors_of_a_slab_go_when_the_ledger_drops_it() -> None:
    cache = make_cache(budget_tokens=512)
    short = allocate(cache, 1, 100)
    cache.free(short, 0)
    longer = [allocate(cache, owner, 256) for owner in (2, 3)]
    assert set(cache.slabs) == set(cache.ledger.slabs) == {slot.slab for slot in longer}
    assert cache.slabs[longer[0].slab].keys[0].shape == (2, 2, 256, 4)
    assert cache.slabs[longer[0].slab].values[1].shape == (2, 1, 256, 3)


def test_no_slot_when_memory_is_short() -> None:
    cache = make_cache(budget_tokens=256)
    allocate(cache, 1, 256)
    assert cache.allocate(2, 1) is None


def test_stale_claim_neither_frees_nor_reads_nor_writes_its_old_slot() -> None:
    cache = make_cache()
    old = allocate(cache, 1)
    cache.free(old, 0)
    new = allocate(cache, 2)
    assert (new.slab, new.index) == (old.slab, old.index)
    for use in (
        lambda: cache.free(old, 0),
        lambda: cache.copy_out(old, 1),
        lambda: cache.copy_in(old, make_prefix(2, seed=0), prefix_uid=1),
    ):
        with pytest.raises(RuntimeError, match="stale claim"):
            use()
    assert is_all(slot_tensors(cache, new), 0.0), "the new owner's columns were written by the old one"
    assert cache.ledger.holds(new)
