"""The paged pool: keys and values of every running row, of the prefixes, and of the texts that are kept.

For every layer one tensor of keys `[pages, kv_heads, PAGE_SIZE, key_dim]` and one of values, in the serving dtype. A
row's columns lie in the pages of its table, 16 a page; a prefix's full pages are read-only and shared by all its rows
(paged attention: Kwon et al. 2023). The pool has two parts that cannot take each other's pages, though any page may
serve in either: `row_pages` for rows and the texts they leave behind, `prefix_pages` for prompts. So a crowd of rows
cannot keep a prompt from being brought, and a crowd of prompts cannot keep a row from running.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from server.engine.pages import PAGE_SIZE, PageLedger, PageNumbers


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


@dataclass(frozen=True, slots=True)
class StackedColumns:
    """Keys and values of n columns as a pool holds them: a tensor a stack of layers, `[layers, kv_heads, n, dim]`.

    The stacks of keys come first, then as many of values.
    """

    parts: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.parts[0].shape[2])

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    def columns(self, first: int, end: int) -> "StackedColumns":
        """A view of columns `first .. end - 1`."""
        return StackedColumns(tuple(part[:, :, first:end] for part in self.parts))

    def clone(self) -> "StackedColumns":
        return StackedColumns(tuple(part.clone() for part in self.parts))

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in self.parts)

    def by_layer(self) -> KeysValues:
        """The same, a view a layer."""
        layers = [tuple(layer for part in half for layer in part) for half in self._halves()]
        return KeysValues(*layers)

    def _halves(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        middle = len(self.parts) // 2
        return self.parts[:middle], self.parts[middle:]


def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes, all layers together."""
    return sum(layer.numel_per_token for layer in layers) * dtype.itemsize


def num_pages_for(num_columns: int) -> int:
    return -(-num_columns // PAGE_SIZE)


class KvPool:
    """The tensors, and the ledger that says whose each page is. Only the engine thread touches them."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        row_pages: int,
        prefix_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        poison_freed: bool = False,
    ) -> None:
        """`poison_freed` fills pages with NaN whenever they become free: whoever reads them shows it."""
        self.ledger = PageLedger(row_pages + prefix_pages)
        self.row_pages = row_pages
        self.prefix_pages = prefix_pages
        self.num_prefix_pages = 0
        self.page_bytes = bytes_per_token(layers, dtype) * PAGE_SIZE
        # Equal layers lie in one tensor, so that a prompt's columns are copied in two calls and not in two a layer.
        is_uniform = all(layer == layers[0] for layer in layers)
        self._stack_sizes = [len(layers)] if is_uniform else [1] * len(layers)
        shapes = [(size, self.ledger.num_pages) for size in self._stack_sizes]
        stacked = list(zip(shapes, layers, strict=False))
        # Not zeroed: the system hands out memory as it is first written, so that a large pool costs what is used of it.
        keys = [torch.empty((*s, x.kv_heads, PAGE_SIZE, x.key_dim), dtype=dtype, device=device) for s, x in stacked]
        values = [torch.empty((*s, x.kv_heads, PAGE_SIZE, x.value_dim), dtype=dtype, device=device) for s, x in stacked]
        self._stacks = (*keys, *values)
        self.key_pages = [stack[layer] for stack in keys for layer in range(len(stack))]
        self.value_pages = [stack[layer] for stack in values for layer in range(len(stack))]
        self._poison_freed = poison_freed
        if poison_freed:
            self._poison(np.arange(self.ledger.num_pages, dtype=np.int32))

    @property
    def num_layers(self) -> int:
        return len(self.key_pages)

    @property
    def num_row_pages(self) -> int:
        """Pages that rows and kept texts hold. Also read by other threads, for a gauge."""
        return self.ledger.num_used - self.num_prefix_pages

    @property
    def num_free_row_pages(self) -> int:
        return self.row_pages - self.num_row_pages

    def allocate(self, owner: int, count: int) -> PageNumbers | None:
        """Pages for the row with serial `owner`, or None when fewer than `count` of the rows' part are free."""
        return self.ledger.allocate(owner, count) if count <= self.num_free_row_pages else None

    def allocate_prefix(self, owner: int, count: int) -> PageNumbers | None:
        """Pages of the prefixes' part, for the compile job with serial `owner`, or None when it is full."""
        if self.num_prefix_pages + count > self.prefix_pages:
            return None
        pages = self.ledger.allocate(owner, count)
        self.num_prefix_pages += count
        return pages

    def release(self, pages: PageNumbers, owner: int) -> None:
        """One holder of each page less. Raises RuntimeError for a stale claim, before anything is changed."""
        freed = self.ledger.release(pages, owner)
        if self._poison_freed:
            self._poison(freed)

    def release_prefix(self, pages: PageNumbers, owner: int) -> None:
        """Like `release`, for pages of the prefixes' part."""
        self.release(pages, owner)
        self.num_prefix_pages -= len(pages)

    def stack(self, columns: KeysValues) -> StackedColumns:
        """A copy of columns that come layer by layer, as this pool holds them."""
        parts = [
            torch.stack(part) for tensors in (columns.keys, columns.values) for part in _cut(tensors, self._stack_sizes)
        ]
        return StackedColumns(tuple(parts))

    def write(self, pages: PageNumbers, columns: StackedColumns) -> None:
        """Put columns into the pages from the first one's beginning. The caller owns the pages."""
        for index in range(num_pages_for(columns.num_tokens)):
            first = index * PAGE_SIZE
            part_of_page = columns.columns(first, min(first + PAGE_SIZE, columns.num_tokens))
            for stack, part in zip(self._stacks, part_of_page.parts, strict=True):
                stack[:, int(pages[index]), :, : part.shape[2]].copy_(part)

    def write_tail(self, page: int, tail: StackedColumns, owner: int, prefix_uid: int) -> None:
        """Put the last columns of a prefix at the beginning of a row's own page, and note whose they are.

        Raises RuntimeError when the page is not `owner`'s, before anything is written.
        """
        self.ledger.stamp_tail(page, owner, prefix_uid)
        self.write(np.array([page], dtype=np.int32), tail)

    def read(self, pages: PageNumbers, num_columns: int) -> StackedColumns:
        """A copy of the first `num_columns` columns of a row with these pages."""
        index = torch.from_numpy(pages[: num_pages_for(num_columns)].astype(np.int64)).to(self._stacks[0].device)
        gathered = [stack[:, index].transpose(1, 2).flatten(2, 3) for stack in self._stacks]
        return StackedColumns(tuple(part[:, :, :num_columns] for part in gathered))

    def check_invariants(self) -> None:
        """Raises RuntimeError when the ledger contradicts itself or a part is over its size."""
        self.ledger.check_invariants()
        if not 0 <= self.num_prefix_pages <= self.prefix_pages:
            raise RuntimeError(f"prefixes hold {self.num_prefix_pages} pages, their part has {self.prefix_pages}")
        if not 0 <= self.num_row_pages <= self.row_pages:
            raise RuntimeError(f"rows hold {self.num_row_pages} pages, their part has {self.row_pages}")

    def _poison(self, pages: PageNumbers) -> None:
        index = torch.from_numpy(pages.astype(np.int64))
        for stack in self._stacks:
            stack[:, index] = float("nan")


def _cut(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split a sequence into runs of these lengths."""
    remaining = iter(tensors)
    for size in sizes:
        yield tuple(islice(remaining, size))
