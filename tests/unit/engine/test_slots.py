"""The ledger of slots against a plain dictionary of who holds what."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.slots import FREE, NO_PREFIX, Slot, SlotLedger


def make_ledger(
    max_tokens: int = 512, budget_tokens: int = 2048, slab_tokens: int = 1024, slots: int = 4
) -> SlotLedger:
    return SlotLedger(
        max_tokens=max_tokens, budget_tokens=budget_tokens, slab_tokens=slab_tokens, max_slots_per_slab=slots
    )


def allocate(ledger: SlotLedger, owner: int, num_tokens: int) -> Slot:
    slot = ledger.allocate(owner, num_tokens)
    assert slot is not None
    return slot


class LedgerSchedule(RuleBasedStateMachine):
    """Rows take and give back slots in any order; `held` is the truth."""

    @initialize(
        max_tokens=st.sampled_from([100, 128, 300, 1000]),
        rows_of_room=st.integers(1, 6),
        slab_tokens=st.integers(1, 3000),
        max_slots=st.integers(1, 8),
    )
    def start(self, max_tokens: int, rows_of_room: int, slab_tokens: int, max_slots: int) -> None:
        self.ledger = make_ledger(max_tokens, max_tokens * rows_of_room, slab_tokens, max_slots)
        self.held: dict[int, Slot] = {}
        self.wanted: dict[int, int] = {}
        self.prefixes: dict[int, int] = {}
        self.stale: list[Slot] = []
        self.next_owner = 1
        self.last_generation = 0

    @rule(share=st.floats(0.0, 1.0))
    def allocate(self, share: float) -> None:
        num_tokens = max(1, round(share * self.ledger.max_tokens))
        could = self.ledger.can_allocate(num_tokens)
        slot = self.ledger.allocate(self.next_owner, num_tokens)
        assert (slot is not None) == could
        if slot is None:
            assert not self.has_room(num_tokens)
            return
        assert slot.owner == self.next_owner
        assert slot.generation > self.last_generation
        assert num_tokens <= slot.capacity
        assert slot.capacity == self.ledger.capacity_for(num_tokens, self.ledger.max_tokens)
        assert (slot.slab, slot.index) not in {(s.slab, s.index) for s in self.held.values()}
        self.last_generation = slot.generation
        self.held[self.next_owner] = slot
        self.wanted[self.next_owner] = num_tokens
        self.prefixes[self.next_owner] = NO_PREFIX
        self.next_owner += 1

    def has_room(self, num_tokens: int) -> bool:
        """Whether a free slot of the right size exists, or slabs in use leave enough tokens for a new one."""
        capacity = self.ledger.capacity_for(num_tokens, self.ledger.max_tokens)
        used: dict[int, int] = {}
        for slot in self.held.values():
            used[slot.slab] = used.get(slot.slab, 0) + 1
        slabs = self.ledger.slabs.values()
        if any(s.capacity == capacity and used.get(s.slab_id, 0) < s.num_slots for s in slabs):
            return True
        taken = sum(s.capacity * s.num_slots for s in slabs if used.get(s.slab_id))
        return taken + capacity <= self.ledger.budget_tokens

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        slot = self.held.pop(owner)
        self.ledger.free(slot)
        self.stale.append(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), uid=st.integers(1, 9))
    def stamp(self, data: st.DataObject, uid: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.ledger.stamp_prefix(self.held[owner], uid)
        self.prefixes[owner] = uid

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def use_a_stale_claim(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.stale))
        assert not self.ledger.holds(slot)
        with pytest.raises(RuntimeError, match="stale claim"):
            self.ledger.free(slot)
        with pytest.raises(RuntimeError, match="stale claim"):
            self.ledger.stamp_prefix(slot, 1)

    @invariant()
    def ledger_shows_exactly_what_is_held(self) -> None:
        self.ledger.check_invariants()
        shown = {
            (slab.slab_id, index): (int(slab.owner[index]), int(slab.generation[index]), int(slab.prefix_uid[index]))
            for slab in self.ledger.slabs.values()
            for index in range(slab.num_slots)
            if slab.owner[index] != FREE
        }
        assert shown == {(s.slab, s.index): (o, s.generation, self.prefixes[o]) for o, s in self.held.items()}
        assert self.ledger.num_slots_used == len(self.held)
        assert self.ledger.tokens_used == sum(slot.capacity for slot in self.held.values())
        assert sum(s.num_slots * s.capacity for s in self.ledger.slabs.values()) <= self.ledger.budget_tokens
        assert all(self.ledger.holds(slot) for slot in self.held.values())

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for slot in self.held.values():
            self.ledger.free(slot)
        assert self.ledger.tokens_used == 0
        assert self.ledger.can_allocate(self.ledger.max_tokens), "an empty ledger must hold the longest row"


TestLedgerSchedule = LedgerSchedule.TestCase
TestLedgerSchedule.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_freed_slot_comes_back_in_a_new_generation() -> None:
    ledger = make_ledger()
    first = allocate(ledger, 1, 100)
    ledger.free(first)
    second = allocate(ledger, 1, 100)
    assert (second.slab, second.index, second.owner) == (first.slab, first.index, first.owner)
    assert second.generation > first.generation
    assert not ledger.holds(first)


def test_freed_slot_forgets_its_prefix() -> None:
    ledger = make_ledger()
    slot = allocate(ledger, 1, 100)
    ledger.stamp_prefix(slot, 7)
    ledger.free(slot)
    assert int(ledger.slabs[slot.slab].prefix_uid[slot.index]) == NO_PREFIX


def test_lowest_free_slot_is_taken_first() -> None:
    ledger = make_ledger()
    slots = [allocate(ledger, owner, 100) for owner in (1, 2, 3)]
    ledger.free(slots[1])
    ledger.free(slots[0])
    assert allocate(ledger, 4, 100).index == slots[0].index


def test_empty_slab_gives_way_to_another_capacity() -> None:
    ledger = make_ledger(budget_tokens=512, slab_tokens=512)
    short = allocate(ledger, 1, 100)
    assert ledger.allocate(2, 512) is None
    ledger.free(short)
    assert allocate(ledger, 2, 512).capacity == 512
    assert short.slab not in ledger.slabs
    assert not ledger.holds(short)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "capacity"),
    [(1, 1000, 128), (128, 1000, 128), (129, 1000, 256), (513, 1000, 1000), (1000, 1000, 1000), (5, 60, 60)],
)
def test_capacity_is_the_next_power_of_two_up_to_the_longest_row(
    num_tokens: int, max_tokens: int, capacity: int
) -> None:
    assert SlotLedger.capacity_for(num_tokens, max_tokens) == capacity


def test_budget_that_holds_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no row"):
        make_ledger(max_tokens=512, budget_tokens=511)


def test_serial_that_means_free_owns_nothing() -> None:
    with pytest.raises(ValueError, match="means free"):
        make_ledger().allocate(FREE, 10)


def test_row_longer_than_the_longest_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed the longest row"):
        make_ledger().allocate(1, 513)


def break_owner(ledger: SlotLedger, slot: Slot) -> None:
    ledger.slabs[slot.slab].owner[slot.index + 1] = slot.owner


def break_prefix(ledger: SlotLedger, slot: Slot) -> None:
    ledger.slabs[slot.slab].prefix_uid[slot.index + 1] = 3


def break_generation(ledger: SlotLedger, slot: Slot) -> None:
    ledger.slabs[slot.slab].generation[slot.index] = 99


def break_budget(ledger: SlotLedger, slot: Slot) -> None:
    ledger.budget_tokens = slot.capacity


@pytest.mark.parametrize("damage", [break_owner, break_prefix, break_generation, break_budget])
def test_invariants_notice_a_damaged_ledger(damage: object) -> None:
    ledger = make_ledger()
    slot = allocate(ledger, 1, 100)
    ledger.check_invariants()
    damage(ledger, slot)  # type: ignore[operator]
    with pytest.raises(RuntimeError):
        ledger.check_invariants()
