"""Random paged batches for the attention kernels: ragged rows, shared pages, poison in whatever must not be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch

from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE, LayerAttention, PagedBatch

AttentionKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, LayerAttention], torch.Tensor
]

LAYOUTS = ("tokens first", "heads first", "fused projection")
"""How a model lays out `[T, heads, dim]` in memory: contiguous, a transposed view, or a slice of one fused product."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes of one layer's attention."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class RowSize:
    """`count` tokens of this step, with which the row is `length` columns long."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """The arguments of one kernel call. The pool already holds the rows' earlier columns, and NaN everywhere else."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    batch: PagedBatch
    layer: LayerAttention

    def run(self, kernel: AttentionKernel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The kernel's answers, and the key and value pages as it leaves them; the case itself stays as it is."""
        key_pages, value_pages = self.key_pages.clone(), self.value_pages.clone()
        answers = kernel(self.query, self.key, self.value, key_pages, value_pages, self.batch, self.layer)
        return answers, key_pages, value_pages

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "AttentionCase":
        """The same case in another dtype or on another device, with the same strides."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
            return target.copy_(tensor)

        batch, sinks = self.batch, self.layer.sinks
        return AttentionCase(
            query=moved(self.query),
            key=moved(self.key),
            value=moved(self.value),
            key_pages=moved(self.key_pages),
            value_pages=moved(self.value_pages),
            batch=replace(
                batch,
                page_table=batch.page_table.to(device),
                lengths=batch.lengths.to(device),
                query_starts=batch.query_starts.to(device),
                write_slots=batch.write_slots.to(device),
            ),
            layer=replace(self.layer, sinks=None if sinks is None else sinks.to(device=device, dtype=dtype)),
        )

    def only(self, row: int) -> "AttentionCase":
        """The same row by itself, over the same pool: the batch of one."""
        first, last = self.batch.query_starts[row : row + 2].tolist()
        count, length = last - first, int(self.batch.lengths[row])
        return replace(
            self,
            query=self.query[first:last],
            key=self.key[first:last],
            value=self.value[first:last],
            batch=PagedBatch(
                page_table=self.batch.page_table[row : row + 1].contiguous(),
                lengths=self.batch.lengths[row : row + 1].contiguous(),
                query_starts=torch.tensor([0, count], dtype=torch.int32),
                write_slots=self.batch.write_slots[first:last].contiguous(),
                num_decoding=int(count == 1),
                max_length=length,
            ),
        )


def make_case(
    shape: HeadShape,
    rows: Sequence[RowSize],
    *,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
    num_padding: int = 0,
    num_shared_pages: int = 0,
    layout: str = "tokens first",
    scale_of_scores: float = 1.0,
    seed: int = 0,
) -> AttentionCase:
    """A batch of the given rows; those of one token come first, as in every plan.

    Pages are dealt out in random order from a pool that is larger than needed. The first `num_shared_pages` pages of
    every row that has them wholly behind this step's tokens are the same ones, as those of a prefix are. Columns that
    no token has written, pages of nobody, and the inputs of padding tokens hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sorted(rows, key=lambda row: row.count != 1)
    num_pages = [-(-row.length // PAGE_SIZE) for row in rows]
    pool_pages = num_shared_pages + sum(num_pages) + 3
    dealt = torch.randperm(pool_pages, generator=generator).tolist()
    shared = [dealt.pop() for _ in range(num_shared_pages)]
    page_table = torch.full((len(rows), max(num_pages) + 1), -1, dtype=torch.int32)
    key_pages = torch.full((pool_pages, shape.kv_heads, PAGE_SIZE, shape.key_dim), float("nan"))
    value_pages = torch.full((pool_pages, shape.kv_heads, PAGE_SIZE, shape.value_dim), float("nan"))
    write_slots: list[int] = []
    for page in shared:
        key_pages[page] = torch.randn(key_pages[page].shape, generator=generator)
        value_pages[page] = torch.randn(value_pages[page].shape, generator=generator)
    for r, row in enumerate(rows):
        past = row.length - row.count
        for index in range(num_pages[r]):
            if index < min(num_shared_pages, past // PAGE_SIZE):
                page_table[r, index] = shared[index]
                continue
            page = dealt.pop()
            page_table[r, index] = page
            written = min(PAGE_SIZE, max(0, past - index * PAGE_SIZE))
            for pages in (key_pages, value_pages):
                pages[page, :, :written] = torch.randn((shape.kv_heads, written, pages.shape[3]), generator=generator)
        for column in range(past, row.length):
            write_slots.append(int(page_table[r, column // PAGE_SIZE]) * PAGE_SIZE + column % PAGE_SIZE)
    num_tokens = len(write_slots)
    query, key, value = _lay_out(shape, num_tokens + num_padding, layout, dtype, generator)
    for tensor in (query, key, value):
        tensor[num_tokens:] = float("nan")
    counts = torch.tensor([row.count for row in rows])
    return AttentionCase(
        query=query,
        key=key,
        value=value,
        key_pages=key_pages.to(dtype),
        value_pages=value_pages.to(dtype),
        batch=PagedBatch(
            page_table=page_table,
            lengths=torch.tensor([row.length for row in rows], dtype=torch.int32),
            query_starts=torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()]),
            write_slots=torch.tensor([*write_slots, *[NO_SLOT] * num_padding], dtype=torch.int64),
            num_decoding=sum(row.count == 1 for row in rows),
            max_length=max(row.length for row in rows),
        ),
        layer=LayerAttention(
            scaling=scale_of_scores * shape.key_dim**-0.5,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=torch.randn(shape.heads, generator=generator).to(dtype) if with_sinks else None,
        ),
    )


def _lay_out(
    shape: HeadShape, num_tokens: int, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[num_tokens, heads, dim]` with the strides of the layout."""
    sizes = [(shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim), (shape.kv_heads, shape.value_dim)]
    if layout == "fused projection":
        fused = torch.randn((num_tokens, sum(h * d for h, d in sizes)), generator=generator).to(dtype)
        parts = fused.split([h * d for h, d in sizes], dim=1)
        query, key, value = (part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True))
    elif layout == "heads first":
        made = (torch.randn((h, num_tokens, d), generator=generator).to(dtype) for h, d in sizes)
        query, key, value = (tensor.transpose(0, 1) for tensor in made)
    else:
        query, key, value = (torch.randn((num_tokens, h, d), generator=generator).to(dtype) for h, d in sizes)
    return query, key, value


@st.composite
def head_shapes(draw: st.DrawFn, max_dim: int = 256) -> HeadShape:
    """Grouped queries or not; dims from 16, not always a power of two, values not always as wide as keys."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    dims = [dim for dim in (16, 24, 40, 64, 72, 80, 96, 128, 192, 256) if dim <= max_dim]
    key_dim = draw(st.sampled_from(dims))
    value_dim = draw(st.sampled_from([key_dim, key_dim, draw(st.sampled_from(dims))]))
    return HeadShape(kv_heads * group, kv_heads, key_dim, value_dim)


@st.composite
def row_sizes(draw: st.DrawFn, max_rows: int = 20, max_length: int = 300) -> list[RowSize]:
    """Mostly decoding rows, some chunks, lengths around page borders as well as anywhere."""
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        count = draw(st.sampled_from([1, 1, 1, 2, 5, 17, 40]))
        past = draw(st.one_of(st.integers(0, max_length - count), st.sampled_from([0, 15, 16, 63, 64, 65])))
        rows.append(RowSize(count, past + count))
    return rows


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float32,
    max_rows: int = 20,
    max_length: int = 300,
    max_dim: int = 256,
) -> AttentionCase:
    """Everything at once: ragged rows, any heads, window, soft cap, sinks, padding, shared pages, every layout."""
    return make_case(
        draw(head_shapes(max_dim)),
        draw(row_sizes(max_rows, max_length)),
        dtype=dtype,
        sliding_window=draw(st.sampled_from([None, None, 1, 7, 16, 50, 128])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        with_sinks=draw(st.booleans()),
        num_padding=draw(st.sampled_from([0, 0, 1, 3])),
        num_shared_pages=draw(st.sampled_from([0, 1, 3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale_of_scores=draw(st.sampled_from([1.0, 8.0])),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
