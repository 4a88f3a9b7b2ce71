"""Says where a row differs from what it should have been. An empty list means that it does not.

Log-probabilities agree within `TOLERANCE_NATS`, of every client token and every generated one, together with their best
alternatives. Greedy tokens are equal. A token that differs is accepted only where the oracle itself shows a near-tie:
its own two likeliest tokens at that position are closer than the tolerance.
"""

import math
from collections.abc import Sequence

import torch

from server.engine.request import TokenLogprob
from tests.integration.isolation.driver import NUM_ALTERNATIVES, Case, RowResult
from tests.integration.isolation.oracle import PeftOracle

TOLERANCE_NATS = 1e-4


def differences_from_oracle(
    case: Case, result: RowResult, oracle: PeftOracle, *, tolerance: float = TOLERANCE_NATS
) -> list[str]:
    """Compare a finished greedy row with PEFT's forward pass over its tokens, and with PEFT's own `generate`."""
    if result.error is not None:
        return [f"{case.row_id} ended with {result.error!r}"]
    if len(result.prompt_logprobs) != len(case.token_ids) or len(result.logprobs) != len(result.token_ids):
        return [f"{case.row_id} has log-probabilities of another number of tokens"]
    expected = oracle.logprobs(case.prompt, [*case.token_ids, *result.token_ids])
    found = [] if result.prompt_logprobs[0] is None else [f"{case.row_id} predicts its first token"]
    for position, difference in enumerate(_position_differences(case, result, expected), start=1):
        if difference > tolerance:
            found.append(f"{case.row_id} ({case.prompt}) token {position}: log-probability off by {difference:.2e}")
    return found + _differences_from_generate(case, result, expected, oracle, tolerance)


def largest_difference_from_oracle(case: Case, result: RowResult, oracle: PeftOracle) -> float:
    """In nats, over all positions of a row that has ended without an error."""
    expected = oracle.logprobs(case.prompt, [*case.token_ids, *result.token_ids])
    return max(_position_differences(case, result, expected))


def largest_difference_from_alone(result: RowResult, alone: RowResult) -> float:
    """In nats, over the client's tokens and those that both generated alike."""
    end = _first_difference(result.token_ids, alone.token_ids)
    pairs = [
        *zip(result.prompt_logprobs, alone.prompt_logprobs, strict=True),
        *zip(result.logprobs[:end], alone.logprobs[:end], strict=True),
    ]
    found = [abs(one.logprob - other.logprob) for one, other in pairs if one is not None and other is not None]
    return max(found, default=0.0)


def differences_from_alone(
    case: Case, result: RowResult, alone: RowResult, oracle: PeftOracle, *, tolerance: float = TOLERANCE_NATS
) -> list[str]:
    """Compare a finished greedy row with the same row as a batch of one."""
    if result.error is not None or alone.error is not None:
        return [f"{case.row_id} ended with {result.error!r}, alone with {alone.error!r}"]
    found = []
    for i, (one, other) in enumerate(zip(result.prompt_logprobs, alone.prompt_logprobs, strict=True)):
        if one is not None and other is not None and not abs(one.logprob - other.logprob) <= tolerance:
            found.append(f"{case.row_id} client token {i}: {one.logprob:.6f}, alone {other.logprob:.6f}")
    parted_at = _first_difference(result.token_ids, alone.token_ids)
    if parted_at is not None:
        expected = oracle.logprobs(case.prompt, [*case.token_ids, *result.token_ids[:parted_at]])
        if _margin(expected[-1]) > tolerance:
            found.append(f"{case.row_id} chose {result.token_ids}, alone {alone.token_ids}")
    elif result.finish_reason != alone.finish_reason:
        found.append(f"{case.row_id} ended by {result.finish_reason}, alone by {alone.finish_reason}")
    for i, (one, other) in enumerate(zip(result.logprobs[:parted_at], alone.logprobs[:parted_at], strict=True)):
        if not abs(one.logprob - other.logprob) <= tolerance:
            found.append(f"{case.row_id} token {i}: {one.logprob:.6f}, alone {other.logprob:.6f}")
    return found


def _differences_from_generate(
    case: Case, result: RowResult, expected: torch.Tensor, oracle: PeftOracle, tolerance: float
) -> list[str]:
    generated = oracle.greedy(case.prompt, case.token_ids, case.max_tokens)
    parted_at = _first_difference(result.token_ids, generated)
    if parted_at is None:
        return []
    if _margin(expected[len(case.token_ids) - 1 + parted_at]) <= tolerance:
        return []
    return [f"{case.row_id} ({case.prompt}) chose {result.token_ids}, PEFT generates {generated}"]


def _position_differences(case: Case, result: RowResult, expected: torch.Tensor) -> list[float]:
    """Of every token but the first, which nothing predicts; `expected [tokens, vocab_size]`."""
    token_ids = [*case.token_ids, *result.token_ids]
    entries = [*result.prompt_logprobs, *result.logprobs]
    return [_difference(entries[i], token_ids[i], expected[i - 1]) for i in range(1, len(token_ids))]


def _difference(entry: TokenLogprob | None, token_id: int, expected: torch.Tensor) -> float:
    """The largest difference of one position: the token itself, its best alternatives, and which they are."""
    if entry is None or entry.token_id != token_id:
        return float("inf")
    differences = [abs(entry.logprob - float(expected[token_id]))]
    differences += [abs(logprob - float(expected[token])) for token, logprob in entry.top]
    best = expected.topk(NUM_ALTERNATIVES).values.tolist()
    differences += [abs(logprob - value) for (_, logprob), value in zip(entry.top, best, strict=False)]
    # A maximum forgets a NaN that does not come first; a sum does not.
    return max(differences) if math.isfinite(sum(differences)) else float("inf")


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where the two part; None when they are equal."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def _margin(logprobs: torch.Tensor) -> float:
    """How much likelier the likeliest token is than the second, in nats."""
    first, second = logprobs.topk(2).values.tolist()
    return float(first - second)
