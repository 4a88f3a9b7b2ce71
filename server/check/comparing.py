"""Whether two answers to one question are the same answer, as far as rounding allows.

Greedy decoding in another batch shape rounds otherwise, so log-probabilities differ a little, and where two tokens are
nearly as likely the other one may be chosen: a near-tie. From there on the two texts are different texts, so the rest
is not compared. Everything else that differs is a fault.
"""

import math
from dataclasses import dataclass

from server.check.asking import Answer

# By the backbone's number format, for logits of a few tens that other batch shapes round otherwise, layer after layer.
# Another prompt's log-probabilities differ by whole units; `promptmux check` says where they do not.
TOLERANCES = {"float32": 0.002, "bfloat16": 0.3, "float16": 0.1}


@dataclass(frozen=True, slots=True)
class Comparison:
    """`max_gap` is the largest difference between the log-probabilities of one token; `fault` None: the same answer."""

    num_compared: int
    max_gap: float
    is_near_tie: bool = False
    fault: str | None = None


def compare(alone: Answer, mixed: Answer, tolerance: float) -> Comparison:
    """`alone` is what was answered with nothing else running. `tolerance` is in log-probability (nats)."""
    max_gap = 0.0
    pairs = zip(alone.tokens, mixed.tokens, alone.logprobs, mixed.logprobs, strict=False)
    for place, (token, other, logprob, other_logprob) in enumerate(pairs):
        if token != other:
            gap = max(_gap(alone, place, other), _gap(mixed, place, token))
            if gap <= tolerance:
                return Comparison(place, max_gap, is_near_tie=True)
            fault = f"token {place} is {other!r} and was {token!r} alone, no near-tie (gap {gap:.3g})"
            return Comparison(place, max_gap, fault=fault)
        gap = abs(logprob - other_logprob)
        # Not `gap > tolerance`: a NaN is not within any tolerance.
        if not gap <= tolerance:
            fault = f"token {place} ({token!r}) has log-probability {other_logprob:.4g} and had {logprob:.4g} alone"
            return Comparison(place, gap, fault=fault)
        max_gap = max(max_gap, gap)
    num_compared = min(len(alone.tokens), len(mixed.tokens))
    if len(alone.tokens) != len(mixed.tokens):
        fault = f"it has {len(mixed.tokens)} tokens and had {len(alone.tokens)} alone"
        return Comparison(num_compared, max_gap, fault=fault)
    return Comparison(num_compared, max_gap)


def _gap(answer: Answer, place: int, token: str) -> float:
    """How much less likely `token` was than the one that was chosen."""
    found = answer.alternatives[place].get(token)
    return math.inf if found is None else answer.logprobs[place] - found
