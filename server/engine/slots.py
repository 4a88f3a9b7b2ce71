"""The ledger of slots: which row owns which memory, in which generation. Numpy bookkeeping, no tensors of the model.

A slot is one contiguous stretch of keys and values, `capacity` tokens long, that belongs to one row at a time. Slots
of equal capacity lie in slabs, so that the rows of a slab can be read in one batched product; capacities are powers
of two, so that a short row never attends over a long row's padding. A slab is made when it is needed and dropped when
it is empty and its bytes are wanted for another capacity.

The ledger is one of the two sides of the isolation check (the other is the plan): each slot carries its owner's
serial, a generation that grows with every allocation, and the uid of the prefix copied into it.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FREE = 0
"""Owner serial of a slot that belongs to nobody. Row serials start at 1."""

NO_PREFIX = 0
"""Prefix uid of a slot whose row has no prompt. Prefix uids start at 1."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A claim on one slot: valid while the ledger still shows this owner and this generation there."""

    slab: int
    index: int
    capacity: int
    owner: int
    generation: int


@dataclass(slots=True)
class Slab:
    """`num_slots` slots of one capacity. Arrays are `[num_slots]`, int64."""

    slab_id: int
    capacity: int
    num_slots: int
    owner: npt.NDArray[np.int64] = field(init=False)
    generation: npt.NDArray[np.int64] = field(init=False)
    prefix_uid: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.owner = np.zeros(self.num_slots, dtype=np.int64)
        self.generation = np.zeros(self.num_slots, dtype=np.int64)
        self.prefix_uid = np.zeros(self.num_slots, dtype=np.int64)

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self.owner))

    @property
    def num_tokens(self) -> int:
        return self.capacity * self.num_slots

    def first_free(self) -> int | None:
        """The lowest free index, which keeps the used part of a slab dense."""
        index = int(np.argmin(self.owner != FREE))
        return index if self.owner[index] == FREE else None


class SlotLedger:
    """Allocates slots within a budget of tokens.

    `max_tokens` is the longest row (virtual, client and new tokens together); `budget_tokens` bounds the sum over all
    slabs; `slab_tokens` is the size that a slab aims at. Not thread-safe: the engine thread owns it.
    """

    MIN_CAPACITY = 128

    def __init__(self, *, max_tokens: int, budget_tokens: int, slab_tokens: int, max_slots_per_slab: int) -> None:
        if budget_tokens < self.capacity_for(max_tokens, max_tokens):
            raise ValueError(f"a budget of {budget_tokens} tokens holds no row of {max_tokens}")
        self.max_tokens = max_tokens
        self.budget_tokens = budget_tokens
        self.slabs: dict[int, Slab] = {}
        self._slab_tokens = slab_tokens
        self._max_slots_per_slab = max_slots_per_slab
        self._next_slab_id = 1
        self._next_generation = 1

    @classmethod
    def capacity_for(cls, num_tokens: int, max_tokens: int) -> int:
        """The capacity of the slot that a row of `num_tokens` gets: the next power of two, at most `max_tokens`."""
        capacity = cls.MIN_CAPACITY
        while capacity < num_tokens:
            capacity *= 2
        return max(min(capacity, max_tokens), num_tokens)

    @property
    def num_slots_used(self) -> int:
        return sum(slab.num_used for slab in tuple(self.slabs.values()))

    @property
    def tokens_used(self) -> int:
        """Also read by other threads, for a gauge: hence the copy of the slabs."""
        return sum(slab.num_used * slab.capacity for slab in tuple(self.slabs.values()))

    def can_allocate(self, num_tokens: int) -> bool:
        capacity = self.capacity_for(num_tokens, self.max_tokens)
        if any(s.capacity == capacity and s.first_free() is not None for s in self.slabs.values()):
            return True
        in_use = sum(slab.num_tokens for slab in self.slabs.values() if slab.num_used)
        return in_use + capacity <= self.budget_tokens

    def allocate(self, owner: int, num_tokens: int) -> Slot | None:
        """A slot of at least `num_tokens` for the row with serial `owner`, or None when memory is short."""
        if owner == FREE:
            raise ValueError("serial 0 means free")
        if num_tokens > self.max_tokens:
            raise ValueError(f"{num_tokens} tokens exceed the longest row of {self.max_tokens}")
        if not self.can_allocate(num_tokens):
            return None
        capacity = self.capacity_for(num_tokens, self.max_tokens)
        slab = next((s for s in self.slabs.values() if s.capacity == capacity and s.first_free() is not None), None)
        if slab is None:
            slab = self._make_slab(capacity)
        index = slab.first_free()
        if index is None:
            raise RuntimeError(f"slab {slab.slab_id} has no free slot although one was found")
        slab.owner[index] = owner
        slab.generation[index] = self._next_generation
        slab.prefix_uid[index] = NO_PREFIX
        slot = Slot(slab.slab_id, index, capacity, owner, self._next_generation)
        self._next_generation += 1
        return slot

    def stamp_prefix(self, slot: Slot, prefix_uid: int) -> None:
        """Record which prefix was copied into the slot."""
        self._require_held(slot)
        self.slabs[slot.slab].prefix_uid[slot.index] = prefix_uid

    def free(self, slot: Slot) -> None:
        """Give the slot back. Raises RuntimeError when the claim is stale: a slot is never freed twice."""
        self._require_held(slot)
        slab = self.slabs[slot.slab]
        slab.owner[slot.index] = FREE
        slab.prefix_uid[slot.index] = NO_PREFIX

    def holds(self, slot: Slot) -> bool:
        """Whether the claim is still the one that the ledger shows."""
        slab = self.slabs.get(slot.slab)
        return (
            slab is not None
            and int(slab.owner[slot.index]) == slot.owner
            and int(slab.generation[slot.index]) == slot.generation
        )

    def check_invariants(self) -> None:
        """Raises RuntimeError when the ledger contradicts itself."""
        owners = [int(o) for slab in self.slabs.values() for o in slab.owner if o != FREE]
        if len(owners) != len(set(owners)):
            raise RuntimeError("a row owns two slots")
        total = sum(slab.num_tokens for slab in self.slabs.values())
        if total > self.budget_tokens:
            raise RuntimeError(f"slabs hold {total} tokens, the budget is {self.budget_tokens}")
        for slab in self.slabs.values():
            if np.any(slab.prefix_uid[slab.owner == FREE] != NO_PREFIX):
                raise RuntimeError(f"a free slot of slab {slab.slab_id} still names a prefix")
            live = slab.generation[slab.owner != FREE]
            if live.size and int(live.max()) >= self._next_generation:
                raise RuntimeError("a generation from the future")

    def _require_held(self, slot: Slot) -> None:
        if not self.holds(slot):
            raise RuntimeError(f"stale claim on slot {slot.index} of slab {slot.slab} by row {slot.owner}")

    def _make_slab(self, capacity: int) -> Slab:
        room = self._drop_empty_slabs(wanted_tokens=capacity)
        wanted = max(1, min(self._slab_tokens // capacity, self._max_slots_per_slab))
        slab = Slab(self._next_slab_id, capacity, max(1, min(wanted, room // capacity)))
        self._next_slab_id += 1
        self.slabs[slab.slab_id] = slab
        return slab

    def _drop_empty_slabs(self, wanted_tokens: int) -> int:
        """Drop empty slabs until `wanted_tokens` fit; returns the room there is then."""
        room = self.budget_tokens - sum(slab.num_tokens for slab in self.slabs.values())
        for slab_id in [i for i, slab in self.slabs.items() if slab.num_used == 0]:
            if room >= wanted_tokens:
                break
            room += self.slabs.pop(slab_id).num_tokens
        return room
