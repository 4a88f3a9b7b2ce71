"""The requests that the benchmarks send: drawn once from a seed, the same for every system that is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: which of the workload's prompts (None: the bare backbone), its tokens, how many new ones."""

    prompt: int | None
    token_ids: tuple[int, ...]
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts` are embeddings `[k, hidden_size]`, float32; `requests` refer to them by index."""

    prompts: Sequence[npt.NDArray[np.float32]]
    requests: Sequence[BenchRequest]

    @property
    def num_new_tokens(self) -> int:
        return sum(request.num_new_tokens for request in self.requests)


def make_workload(
    embeddings: npt.NDArray[np.float32],
    *,
    num_requests: int,
    num_prompts: int,
    k: int,
    new_tokens: str,
    seed: int,
) -> Workload:
    """Draw a workload. `embeddings [vocab_size, hidden_size]` are the backbone's, from which prompts take their rows.

    Client tokens: uniform over 8 to 64. `new_tokens` is "fixed" (32 each) or "lognormal" (median 24, sigma 0.9, cut to
    4 to 128). The requests' tokens and lengths depend on the seed alone, not on how many prompts there are.
    """
    rng = np.random.default_rng(seed)
    vocab_size = len(embeddings)
    lengths = rng.integers(8, 65, num_requests)
    token_ids = [tuple(rng.integers(3, vocab_size, int(length)).tolist()) for length in lengths]
    if new_tokens == "fixed":
        new = np.full(num_requests, 32)
    elif new_tokens == "lognormal":
        new = np.clip(np.round(rng.lognormal(np.log(24), 0.9, num_requests)), 4, 128).astype(int)
    else:
        raise ValueError(f"new_tokens is {new_tokens!r}; known are fixed and lognormal")
    prompt_rng = np.random.default_rng(seed + 1)
    prompts = [embeddings[prompt_rng.integers(3, vocab_size, k)] for _ in range(num_prompts)]
    requests = [
        BenchRequest(i % num_prompts if num_prompts else None, ids, int(count))
        for i, (ids, count) in enumerate(zip(token_ids, new, strict=True))
    ]
    return Workload(prompts, requests)
