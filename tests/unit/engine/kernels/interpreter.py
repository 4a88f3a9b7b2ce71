"""Runs the Triton kernel under Triton's interpreter, in a process of its own.

Triton decides at its first import whether it interprets, and other tests import it too, to compile (PEFT does so by
itself). A process of its own can be told beforehand, whatever was imported here and in whatever order.
"""

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from server.engine.kernels.batch import PAGE_SIZE, LayerAttention, PagedBatch
from server.engine.kernels.gather import gather_attention
from server.engine.kernels.triton_attention import triton_attention
from tests.unit.engine.kernels.batches import AttentionCase

Outcome = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Answers, key pages, value pages."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The process that interprets."""

    process: ProcessPoolExecutor

    def run(self, case: AttentionCase, num_splits: int | None = None) -> Outcome:
        """What `case.run(triton_attention)` returns."""
        return self.process.submit(_run, case, num_splits).result()

    def run_in_huge_pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's answers and the plain kernel's for a row whose pages lie at both ends of a huge pool."""
        return self.process.submit(_run_in_huge_pool).result()


@contextmanager
def started_interpreter() -> Iterator[Interpreter]:
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawning, initializer=_start) as process:
        yield Interpreter(process)


def _start() -> None:
    warnings.simplefilter("error")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # Memory that a kernel allocates begins full of NaN: what it leaves unwritten shows.
    torch.use_deterministic_algorithms(True)


def _run(case: AttentionCase, num_splits: int | None) -> Outcome:
    return case.run(partial(triton_attention, num_splits=num_splits))


def _run_in_huge_pool() -> tuple[torch.Tensor, torch.Tensor]:
    """The pool has more than 2^31 elements; memory that nobody touches costs nothing."""
    dim = 256
    num_pages = 2**31 // (PAGE_SIZE * dim) + 2
    torch.use_deterministic_algorithms(False)
    key_pages, value_pages = (torch.empty((num_pages, 1, PAGE_SIZE, dim), dtype=torch.float16) for _ in range(2))
    pages = [num_pages - 1, 0, num_pages - 2]
    generator = torch.Generator().manual_seed(0)
    for page in pages:
        for pool in (key_pages, value_pages):
            pool[page] = torch.randn(pool[page].shape, generator=generator).half()
    length = 40
    batch = PagedBatch(
        page_table=torch.tensor([pages], dtype=torch.int32),
        lengths=torch.tensor([length], dtype=torch.int32),
        query_starts=torch.tensor([0, 1], dtype=torch.int32),
        write_slots=torch.tensor([pages[2] * PAGE_SIZE + length - 1 - 2 * PAGE_SIZE], dtype=torch.int64),
        num_decoding=1,
        max_length=length,
    )
    query, key, value = (torch.randn((1, 1, dim), generator=generator).half() for _ in range(3))
    layer = LayerAttention(scaling=dim**-0.5)
    torch.use_deterministic_algorithms(True)
    answers = triton_attention(query, key, value, key_pages, value_pages, batch, layer)
    return answers, gather_attention(query, key, value, key_pages, value_pages, batch, layer)
