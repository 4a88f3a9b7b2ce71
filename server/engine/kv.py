"""The tensors behind the ledger of slots: keys and values, a slab at a time.

A slab holds, for every layer, keys `[num_slots, kv_heads, capacity, key_dim]` and values
`[num_slots, kv_heads, capacity, value_dim]` in the serving dtype, so that one row's slot is one contiguous stretch a
head. Batched reads run over a slot's columns up to the longest row of the read; what lies behind a shorter row's end is
masked, but 0 times NaN is NaN, so a slot is zeroed when it is given out: nothing that an earlier row left behind, not
even NaN, reaches the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.slots import Slot, SlotLedger


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's heads: most models have the same everywhere, some (gemma3n, deepseek) do not."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numel_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Keys and values of k columns for every layer: `[kv_heads, k, key_dim]` and `[kv_heads, k, value_dim]` each."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


@dataclass(slots=True)
class SlabTensors:
    keys: list[torch.Tensor]  # a layer: [num_slots, kv_heads, capacity, key_dim]
    values: list[torch.Tensor]  # a layer: [num_slots, kv_heads, capacity, value_dim]
    dirty_columns: list[int]  # a slot: columns that may hold something other than zero


class KvCache:
    """Keys and values of all running rows. Only the engine thread touches it.

    `ledger` decides who owns what; this class follows it: tensors of a slab come with its first slot and go when the
    ledger drops the slab.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        ledger: SlotLedger,
        *,
        dtype: torch.dtype,
        device: torch.device,
        poison_freed: bool = False,
    ) -> None:
        self.ledger = ledger
        self.slabs: dict[int, SlabTensors] = {}
        self._layers = tuple(layers)
        self._dtype = dtype
        self._device = device
        self._poison_freed = poison_freed

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        return sum(layer.numel_per_token for layer in layers) * dtype.itemsize

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def allocate(self, owner: int, num_tokens: int) -> Slot | None:
        """A clean slot (all zero) for the row with serial `owner`, or None when memory is short."""
        slot = self.ledger.allocate(owner, num_tokens)
        if slot is None:
            return None
        self._follow_ledger()
        slab = self.slabs[slot.slab]
        self._fill(slab, slot.index, slab.dirty_columns[slot.index], 0.0)
        slab.dirty_columns[slot.index] = slot.capacity
        return slot

    def free(self, slot: Slot, num_columns: int) -> None:
        """Give the slot back; `num_columns` of it were ever written and need cleaning before the next owner.

        Raises RuntimeError for a stale claim.
        """
        self.ledger.free(slot)
        slab = self.slabs[slot.slab]
        if self._poison_freed:
            self._fill(slab, slot.index, slot.capacity, float("nan"))
        else:
            slab.dirty_columns[slot.index] = num_columns

    def copy_in(self, slot: Slot, prefix: KeysValues, prefix_uid: int) -> None:
        """Put a prefix into columns 0 to k-1 of the slot and stamp the ledger with its uid.

        Raises RuntimeError for a stale claim, before anything is written.
        """
        self.ledger.stamp_prefix(slot, prefix_uid)
        slab = self.slabs[slot.slab]
        k = prefix.num_tokens
        for layer in range(self.num_layers):
            slab.keys[layer][slot.index, :, :k].copy_(prefix.keys[layer])
            slab.values[layer][slot.index, :, :k].copy_(prefix.values[layer])

    def copy_out(self, slot: Slot, num_columns: int) -> KeysValues:
        """A copy of the first `num_columns` columns of the slot."""
        if not self.ledger.holds(slot):
            raise RuntimeError(f"stale claim on slot {slot.index} of slab {slot.slab} by row {slot.owner}")
        slab = self.slabs[slot.slab]
        return KeysValues(
            keys=tuple(keys[slot.index, :, :num_columns].clone() for keys in slab.keys),
            values=tuple(values[slot.index, :, :num_columns].clone() for values in slab.values),
        )

    def _follow_ledger(self) -> None:
        for slab_id in [i for i in self.slabs if i not in self.ledger.slabs]:
            del self.slabs[slab_id]
        for slab_id, slab in self.ledger.slabs.items():
            if slab_id not in self.slabs:
                self.slabs[slab_id] = SlabTensors(
                    keys=[self._zeros(slab.num_slots, s.kv_heads, slab.capacity, s.key_dim) for s in self._layers],
                    values=[self._zeros(slab.num_slots, s.kv_heads, slab.capacity, s.value_dim) for s in self._layers],
                    dirty_columns=[0] * slab.num_slots,
                )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    @staticmethod
    def _fill(slab: SlabTensors, index: int, num_columns: int, value: float) -> None:
        if num_columns:
            for tensor in (*slab.keys, *slab.values):
                tensor[index, :, :num_columns].fill_(value)
