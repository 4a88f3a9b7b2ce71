"""The pool holds what was put there, bit for bit, in its two parts, and shows it when freed pages are read."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.kv import KeysValues, KvPool, LayerShape, bytes_per_token, num_pages_for
from server.engine.pages import NO_PREFIX, PAGE_SIZE, SHARED, PageNumbers

LAYERS = (LayerShape(kv_heads=2, key_dim=4, value_dim=4), LayerShape(kv_heads=1, key_dim=6, value_dim=3))
CPU = torch.device("cpu")
UNTOUCHED = 7.25


def make_pool(
    *,
    row_pages: int = 12,
    prefix_pages: int = 6,
    dtype: torch.dtype = torch.float32,
    poison: bool = False,
    layers: Sequence[LayerShape] = LAYERS,
) -> KvPool:
    pool = KvPool(layers, row_pages=row_pages, prefix_pages=prefix_pages, dtype=dtype, device=CPU, poison_freed=poison)
    if not poison:
        for tensor in tensors(pool):
            tensor.fill_(UNTOUCHED)
    return pool


def tensors(pool: KvPool) -> list[torch.Tensor]:
    return [*pool.key_pages, *pool.value_pages]


def take(pool: KvPool, owner: int, count: int) -> PageNumbers:
    pages = pool.allocate(owner, count)
    assert pages is not None
    return pages


def make_columns(
    k: int, seed: int, dtype: torch.dtype = torch.float32, layers: Sequence[LayerShape] = LAYERS
) -> KeysValues:
    generator = torch.Generator().manual_seed(seed)
    return KeysValues(
        keys=tuple(torch.randn(s.kv_heads, k, s.key_dim, generator=generator).to(dtype) for s in layers),
        values=tuple(torch.randn(s.kv_heads, k, s.value_dim, generator=generator).to(dtype) for s in layers),
    )


def assert_same(one: KeysValues, other: KeysValues) -> None:
    for left, right in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("layers", [LAYERS, (LAYERS[1],) * 3], ids=["unlike layers", "equal layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(k=st.integers(1, 5 * PAGE_SIZE), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=25, deadline=None)
def test_columns_come_out_as_they_went_in_and_no_other_column_is_touched(
    dtype: torch.dtype, layers: Sequence[LayerShape], k: int, seed: int, data: st.DataObject
) -> None:
    pool = make_pool(dtype=dtype, layers=layers)
    pages = np.array(data.draw(st.permutations(take(pool, 1, 8).tolist())), dtype=np.int32)[: num_pages_for(k) + 1]
    columns = make_columns(k, seed, dtype, layers)
    pool.write(pages, pool.stack(columns))
    assert_same(pool.read(pages, k).by_layer(), columns)
    # Column c of the row is offset c % PAGE_SIZE of page c // PAGE_SIZE; all else is as it was.
    expected = [torch.full_like(tensor, UNTOUCHED) for tensor in tensors(pool)]
    for tensor, columns_of_layer in zip(expected, (*columns.keys, *columns.values), strict=True):
        for column in range(k):
            tensor[int(pages[column // PAGE_SIZE]), :, column % PAGE_SIZE] = columns_of_layer[:, column]
    assert all(torch.equal(found, wanted) for found, wanted in zip(tensors(pool), expected, strict=True))


@given(k=st.integers(1, 40), first=st.integers(0, 40), num_columns=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_part_of_the_columns_is_a_view_of_them(k: int, first: int, num_columns: int) -> None:
    columns = make_pool().stack(make_columns(k, 0))
    first, end = min(first, k), min(first + num_columns, k)
    part = columns.columns(first, end)
    assert part.num_tokens == max(0, end - first)
    for whole, piece in zip(columns.parts, part.parts, strict=True):
        assert torch.equal(piece, whole[:, :, first:end])
    own = part.clone()
    columns.parts[0].fill_(9.0)
    assert part.num_tokens == 0 or bool((part.parts[0] == 9.0).all())
    assert own.num_tokens == 0 or not bool((own.parts[0] == 9.0).any())


def test_what_is_read_is_a_copy() -> None:
    pool = make_pool()
    pages = take(pool, 1, 1)
    pool.write(pages, pool.stack(make_columns(3, seed=1)))
    found = pool.read(pages, 3)
    for tensor in tensors(pool):
        tensor.fill_(9.0)
    assert_same(found.by_layer(), make_columns(3, seed=1))


@pytest.mark.parametrize("k", [1, PAGE_SIZE - 1, PAGE_SIZE])
def test_tail_is_at_the_pages_beginning_and_its_prefix_is_noted(k: int) -> None:
    pool = make_pool()
    _, page = take(pool, 1, 2).tolist()
    tail = make_columns(k, seed=3)
    pool.write_tail(page, pool.stack(tail), owner=1, prefix_uid=5)
    assert_same(pool.read(np.array([page], dtype=np.int32), k).by_layer(), tail)
    assert pool.ledger.tail_uid.tolist() == [5 if i == page else NO_PREFIX for i in range(pool.ledger.num_pages)]
    for tensor in tensors(pool):
        assert bool((tensor[page, :, k:] == UNTOUCHED).all())


@pytest.mark.parametrize("state", ["another row's", "free", "shared"])
def test_tail_is_not_written_into_a_page_that_is_not_the_rows_own(state: str) -> None:
    pool = make_pool()
    (page,) = take(pool, 2, 1).tolist()
    if state == "free":
        pool.release(np.array([page], dtype=np.int32), 2)
    elif state == "shared":
        pool.ledger.share(page, 2, content=8)
    with pytest.raises(RuntimeError, match="not owned by row 1"):
        pool.write_tail(page, pool.stack(make_columns(2, seed=0)), owner=1, prefix_uid=5)
    assert all(bool((tensor == UNTOUCHED).all()) for tensor in tensors(pool))
    assert not pool.ledger.tail_uid.any()


def test_bytes_of_columns_and_of_pages() -> None:
    columns = make_columns(5, seed=0)
    assert columns.num_tokens == 5
    per_token = bytes_per_token(LAYERS, torch.float32)
    assert per_token == 4 * (2 * (4 + 4) + 1 * (6 + 3))
    assert make_pool().stack(columns).num_bytes == 5 * per_token
    assert make_pool().page_bytes == PAGE_SIZE * per_token
    assert make_pool(dtype=torch.bfloat16).page_bytes == PAGE_SIZE * per_token // 2


@pytest.mark.parametrize(("num_columns", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for_columns(num_columns: int, num_pages: int) -> None:
    assert num_pages_for(num_columns) == num_pages


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_columns_that_are_not_finite_are_seen(where: str, bad: float) -> None:
    columns = make_columns(3, seed=0)
    pool = make_pool()
    assert pool.stack(columns).is_finite()
    getattr(columns, where)[1][0, 2, 1] = bad
    assert not pool.stack(columns).is_finite()


def is_nan(pool: KvPool, page: int) -> bool:
    """Whether the page is all NaN. A page that is NaN in part is a defect of its own."""
    parts = {bool(tensor[page].isnan().all()) for tensor in tensors(pool)}
    assert len(parts) == 1
    return parts.pop()


def test_poison_fills_pages_when_they_become_free_and_only_then() -> None:
    pool = make_pool(poison=True)
    assert all(is_nan(pool, page) for page in range(pool.ledger.num_pages)), "nothing was written yet"
    pages = take(pool, 1, 3)
    pool.write(pages, pool.stack(make_columns(3 * PAGE_SIZE, seed=0)))
    pool.ledger.share(int(pages[1]), 1, content=5)
    pool.ledger.hold([int(pages[1])])
    pool.release(pages[:2], 1)
    assert [is_nan(pool, page) for page in pages.tolist()] == [True, False, False], "one is still held, one is owned"
    pool.release(pages[1:2], SHARED)
    assert [is_nan(pool, page) for page in pages.tolist()] == [True, True, False]


@pytest.mark.parametrize("claim", ["release", "release_prefix"])
def test_stale_claim_changes_nothing(claim: str) -> None:
    pool = make_pool(poison=True)
    old = pool.allocate_prefix(1, 2)
    assert old is not None
    pool.release_prefix(old, 1)
    new = pool.allocate_prefix(2, 2)
    assert new is not None
    assert new.tolist() == old.tolist()
    pool.write(new, pool.stack(make_columns(2 * PAGE_SIZE, seed=0)))
    with pytest.raises(RuntimeError, match="stale claim of row 1"):
        getattr(pool, claim)(old, 1)
    assert_same(pool.read(new, 2 * PAGE_SIZE).by_layer(), make_columns(2 * PAGE_SIZE, seed=0))
    assert pool.num_prefix_pages == 2
    pool.check_invariants()


class TwoParts(RuleBasedStateMachine):
    """Rows and prefixes take and give back pages; neither part ever takes what is the other's."""

    @initialize(row_pages=st.integers(1, 6), prefix_pages=st.integers(0, 6))
    def start(self, row_pages: int, prefix_pages: int) -> None:
        self.pool = make_pool(row_pages=row_pages, prefix_pages=prefix_pages, poison=True)
        self.rows: dict[int, PageNumbers] = {}
        self.prefixes: dict[int, PageNumbers] = {}
        self.serial = 0

    @rule(count=st.integers(0, 7))
    def take_for_a_row(self, count: int) -> None:
        self.serial += 1
        pages = self.pool.allocate(self.serial, count)
        assert (pages is not None) == (count <= self.pool.row_pages - self.used(self.rows))
        if pages is not None:
            self.rows[self.serial] = pages

    @rule(count=st.integers(0, 7))
    def take_for_a_prefix(self, count: int) -> None:
        self.serial += 1
        pages = self.pool.allocate_prefix(self.serial, count)
        assert (pages is not None) == (count <= self.pool.prefix_pages - self.used(self.prefixes))
        if pages is not None:
            self.prefixes[self.serial] = pages

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end_a_row(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.rows)))
        self.pool.release(self.rows.pop(serial), serial)

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data(), is_shared=st.booleans())
    def forget_a_prefix(self, data: st.DataObject, is_shared: bool) -> None:
        serial = data.draw(st.sampled_from(sorted(self.prefixes)))
        pages = self.prefixes.pop(serial)
        for page in pages.tolist() if is_shared else []:
            self.pool.ledger.share(page, serial, content=page + 1)
        self.pool.release_prefix(pages, SHARED if is_shared else serial)

    @staticmethod
    def used(part: dict[int, PageNumbers]) -> int:
        return sum(len(pages) for pages in part.values())

    @invariant()
    def counts_are_right_and_no_page_is_given_twice(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_row_pages == self.used(self.rows)
        assert self.pool.num_prefix_pages == self.used(self.prefixes)
        assert self.pool.num_free_row_pages == self.pool.row_pages - self.used(self.rows)
        given = [page for part in (self.rows, self.prefixes) for pages in part.values() for page in pages.tolist()]
        assert len(given) == len(set(given))


TestTwoParts = TwoParts.TestCase
TestTwoParts.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("damage", ["ledger", "too many prefixes", "too few prefixes", "too many rows"])
def test_invariants_notice_a_damaged_pool(damage: str) -> None:
    pool = make_pool(row_pages=2, prefix_pages=1)
    take(pool, 1, 2)
    pool.check_invariants()
    if damage == "ledger":
        pool.ledger.num_holders[0] = 2
    elif damage == "too many prefixes":
        pool.num_prefix_pages = 2
    elif damage == "too few prefixes":
        pool.num_prefix_pages = -1
    else:
        pool.ledger.allocate(3, 1)
    with pytest.raises(RuntimeError):
        pool.check_invariants()
