"""A one-layer model over a paged pool, and decode plans for it: what captured steps are tested with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from server.engine.cuda_graphs import DecodeBuffers
from server.engine.kernels.batch import PAGE_SIZE, LayerAttention, PagedBatch
from server.engine.kernels.gather import gather_attention
from server.engine.plan import PlanEntry, StepPlan, build_plan
from tests.unit.engine.kernels.batches import AttentionKernel

VOCAB_SIZE = 50
HEADS, KV_HEADS, DIM = 4, 2, 16


class TinyDecoder:
    """Embeddings of tokens and positions, one attention layer, a head. fp32; the pool begins full of noise."""

    def __init__(self, num_pages: int, kernel: AttentionKernel, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        hidden = HEADS * DIM
        self._kernel = kernel
        self._tokens, self._positions = drawn(VOCAB_SIZE, hidden), drawn(1024, hidden)
        self._query = drawn(hidden, hidden) / hidden**0.5
        self._key, self._value = (drawn(hidden, KV_HEADS * DIM) / hidden**0.5 for _ in range(2))
        self._head = drawn(hidden, VOCAB_SIZE)
        self.key_pages, self.value_pages = (drawn(num_pages, KV_HEADS, PAGE_SIZE, DIM) for _ in range(2))

    def forward(self, buffers: DecodeBuffers) -> torch.Tensor:
        return self.logits(buffers.token_ids, buffers.positions, buffers.batch)[buffers.logits_tokens]

    def logits(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """`[T, VOCAB_SIZE]`."""
        states = self._tokens[token_ids] + self._positions[positions]
        answers = self._kernel(
            (states @ self._query).unflatten(1, (HEADS, DIM)),
            (states @ self._key).unflatten(1, (KV_HEADS, DIM)),
            (states @ self._value).unflatten(1, (KV_HEADS, DIM)),
            self.key_pages,
            self.value_pages,
            batch,
            LayerAttention(scaling=DIM**-0.5),
        )
        return (states + answers.flatten(1)) @ self._head

    def eager(self, plan: StepPlan) -> torch.Tensor:
        """The plan's logits, without buffers."""
        device = self._head.device
        token_ids, positions = (torch.from_numpy(given).to(device) for given in (plan.token_ids, plan.positions))
        return self.logits(token_ids, positions, plan.batch(device))


def gather_rows_with_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    layer: LayerAttention,
) -> torch.Tensor:
    """The plain kernel, for batches padded by rows without tokens."""
    num_rows = int((batch.query_starts.diff() > 0).sum())
    filled = replace(
        batch,
        page_table=batch.page_table[:num_rows],
        lengths=batch.lengths[:num_rows],
        query_starts=batch.query_starts[: num_rows + 1],
        num_decoding=num_rows,
    )
    return gather_attention(query, key, value, key_pages, value_pages, filled, layer)


@dataclass(slots=True)
class Dealer:
    """Deals out pages, each once."""

    pages: list[int]

    def plan(self, lengths: Sequence[int]) -> StepPlan:
        """A decode step of rows that are so long with the step's token."""
        return build_plan([self.entry(length, 1) for length in lengths])[0]

    def entry(self, length: int, count: int) -> PlanEntry:
        pages = np.array([self.pages.pop() for _ in range(-(-length // PAGE_SIZE))], dtype=np.int32)
        token_ids = [(7 * length + i) % VOCAB_SIZE for i in range(count)]
        return PlanEntry(pages=pages, start_column=length - count, token_ids=token_ids, logits_from=count - 1)


def dealer(num_pages: int, seed: int = 0) -> Dealer:
    return Dealer(torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
