"""How long a step may take for the rows of large tenants, while a small one is about.

Whoever sends one request after another meets a step under way each time, waits for its end, and has its own tokens
computed beside everybody else's from then on. So that this costs it no more than it would take by itself, ordinary
steps are limited by time (`StepTimes`):

- A small tenant of which nothing runs at the moment, but which has been there of late, may come back at any moment: the
  step under way then should take no longer than its own first step will. It is expected for `CALM_A_SECOND` times what
  its own rows have taken, and for `CALM_S` at most: else one token in ten seconds would keep all steps short for ever.
- To a step in which rows of small tenants take part, large ones add no more than these take by themselves.
- Large tenants get part of each step whatever that does to the first two. Where a step takes about as long whatever is
  in it, that part holds all of their rows and nothing is ever limited.

Owns which small tenants have been there of late. Refuses to know rows and pages: the scheduler chooses who takes part
within the time. Only the engine thread touches it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.engine.shares import Shares
from server.engine.step_times import StepTimes

CALM_S = 10.0
"""So long after its last step a small tenant is expected to come back at most."""
CALM_A_SECOND = 30.0
"""Seconds for which it is expected, for each that its rows take by themselves: a bound for what it costs when away."""
MAX_CALM = 256
"""So many tenants are expected at most, those that were there last."""

PART_OF_OTHERS = 0.75
"""Of what a small tenant's rows take by themselves, so much is added by large ones at most. The goal is as much again;
the rest is margin for what is not foreseen."""
LEAST_PART = 1 / 3
"""Large tenants may always have so much of what an empty step takes: a quarter of each step, then."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """A small tenant's last step, till when it is expected back, and how many tokens its last first step had."""

    seen_s: float
    until_s: float
    num_first_tokens: int


class Caution:
    """The small tenants of late, and what they leave to the others."""

    def __init__(self, times: StepTimes, clock: Callable[[], float]) -> None:
        self._times = times
        self._clock = clock
        self._calm: OrderedDict[str, _Visit] = OrderedDict()  # those seen last at the end

    def saw(self, tenant: str, num_first_tokens: int | None, own_s: float) -> None:
        """Rows of a small tenant take part in a step, which would take `own_s` with these alone; with so many tokens,
        if some are of the client's.
        """
        now_s = self._clock()
        before = self._calm.pop(tenant, _Visit(now_s, now_s, 1))
        calm_s = max(before.until_s - now_s, 0.0) + CALM_A_SECOND * own_s
        self._calm[tenant] = _Visit(
            now_s,
            now_s + min(calm_s, CALM_S),
            before.num_first_tokens if num_first_tokens is None else num_first_tokens,
        )
        if len(self._calm) > MAX_CALM:
            self._calm.popitem(last=False)

    def seconds_for_others(self, shares: Shares, num_rows: int, num_tokens: int) -> float:
        """By how much large tenants may lengthen a step of so many rows and tokens of small ones; may be infinite.

        `shares` are those of the step.
        """
        if not self._times.is_known:
            return math.inf
        own_s = self._times.of(num_rows, num_tokens)
        allowed = [PART_OF_OTHERS * own_s] if num_rows else []
        num_expected = min(self._expected(shares), default=None)
        if num_expected is not None:
            allowed.append(PART_OF_OTHERS * self._times.of(1, num_expected) - own_s)
        if not allowed:
            return math.inf
        return max(min(allowed), LEAST_PART * self._times.base_s)

    def clear(self) -> None:
        self._calm.clear()

    def _expected(self, shares: Shares) -> Iterator[int]:
        """The first steps' tokens of small tenants that may come back at any moment."""
        now_s = self._clock()
        for tenant, visit in reversed(self._calm.items()):
            if visit.seen_s < now_s - CALM_S:
                return
            if now_s <= visit.until_s and not shares.num_running[tenant] and tenant not in shares.large:
                yield visit.num_first_tokens
