"""How fast one decode step could be at best: what it must read and multiply, over what the machine can.

Owns the two measurements of the machine and the count of the model's work. Refuses to know the engine. The model of a
step is the roofline of Williams, Waterman and Patterson (2009) with the two terms that do not depend on how the step is
computed: every weight is read once, and every weight of a product is multiplied with every row. Keys and values are
counted apart, for they depend on the rows' lengths.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.packed_weights import pack, usable_forms

# Far beyond any last-level cache, so that memory is what is measured.
READ_BYTES = 512 << 20
GEMM_SIZES = (1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Machine:
    """`read_bytes_per_s`: best of three ways to read `READ_BYTES`. `flops_per_s`: best product of a large square matrix
    with as many rows, or with 64, by torch or by one of the engine's own forms of weights.
    """

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one decode step must do: bytes of weights that it reads, and multiply-adds × 2 a row."""

    weight_bytes: int
    flops_per_row: int

    def limit_s(self, machine: Machine, num_rows: int, kv_bytes: int = 0) -> float:
        """Seconds below which a step of `num_rows` rows cannot fall on this machine."""
        read_s = (self.weight_bytes + kv_bytes) / machine.read_bytes_per_s
        return max(read_s, num_rows * self.flops_per_row / machine.flops_per_s)


def measure_machine(device: torch.device, dtype: torch.dtype, *, repeats: int = 5, quick: bool = False) -> Machine:
    """Measure with the process' current number of torch threads, in `dtype` for products. Takes seconds.

    Each way is run `repeats` times after a warm-up and its best time counts: a limit is what the machine can do.
    """
    num_bytes = READ_BYTES // 8 if quick else READ_BYTES
    values = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    columns = 8192
    matrix, vector = values.view(-1, columns), torch.ones(columns, dtype=torch.float32, device=device)
    # Which of them is the fastest reader differs between CPUs: the product is written by the BLAS, the sums by torch.
    reads: list[Callable[[], object]] = [values.sum, values.norm, lambda: matrix @ vector]
    read_bytes_per_s = num_bytes / min(_best_s(read, device, repeats) for read in reads)
    flops_per_s = 0.0
    for size in GEMM_SIZES[:1] if quick else GEMM_SIZES:
        left = torch.randn(size, size, dtype=dtype, device=device)
        right = torch.randn(size, size, dtype=dtype, device=device)
        products: list[tuple[int, Callable[[], object]]] = [
            (size, partial(torch.matmul, left, right)),
            (size, partial(torch.nn.functional.linear, left, right)),
        ]
        # The engine's own packed weights too: a limit that the engine could pass would be none.
        for form in usable_forms(dtype, device, "none"):
            packed = pack(form, [right], [None], "none")
            products += [(rows, partial(packed.multiply, left[:rows])) for rows in (64, size)]
        for rows, product in products:
            flops_per_s = max(flops_per_s, 2 * rows * size**2 / _best_s(product, device, repeats))
    return Machine(read_bytes_per_s, flops_per_s)


def count_work(folder: str, dtype: torch.dtype) -> Work:
    """Count the weights of the model in `folder`, by its configuration alone, as if each were used in every step.

    The input embeddings are a product only where they are tied to the LM head; else a step reads single rows of them,
    which are not counted. A mixture of experts reads fewer weights than are counted at small batches.
    """
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    weights = {id(weight): weight for weight in model.parameters()}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embeddings is not head:
        weights.pop(id(embeddings))
    num_read = sum(weight.numel() for weight in weights.values())
    num_multiplied = sum(weight.numel() for weight in weights.values() if weight.ndim >= 2)
    return Work(num_read * dtype.itemsize, 2 * num_multiplied)


def _best_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    best_s = float("inf")
    for repeat in range(repeats + 1):
        _wait_for(device)
        started_s = time.perf_counter()
        work()
        _wait_for(device)
        # The first run touches the memory and starts the threads.
        if repeat:
            best_s = min(best_s, time.perf_counter() - started_s)
    return best_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
