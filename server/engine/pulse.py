"""What the step loop does now, since when, and how long the like of it has taken.

Whoever watches the loop from outside can so tell a step that is long from one that hangs: steps of one kind (about as
many tokens, about as long rows) take about as long each time. Owns these times. Refuses to know rows and tensors, and
what follows from a silence. Written by the engine's thread alone; any thread may look.
"""

import time
from collections.abc import Callable

# A slow step is forgotten by and by: it may have been the machine that stood still.
_KEPT_A_STEP = 0.98

StepKind = tuple[int, int]


def step_kind(num_tokens: int, max_length: int) -> StepKind:
    """Steps of one kind have as many tokens, and as many columns in their longest row, each within a factor of two."""
    return num_tokens.bit_length(), max_length.bit_length()


class Pulse:
    """The engine says what it begins; what it began before has ended then."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usual_s: dict[StepKind, float] = {}
        self._now: tuple[StepKind | None, float] = (None, clock())

    def begin(self, kind: StepKind | None) -> None:
        """`kind` None: something of which nobody knows how long it takes."""
        now_s = self._clock()
        before, since_s = self._now
        if before is not None:
            self._usual_s[before] = max(now_s - since_s, self._usual_s.get(before, 0.0) * _KEPT_A_STEP)
        self._now = (kind, now_s)

    def look(self) -> tuple[float, float | None]:
        """How long the engine has been at it, and the longest that this kind of step took of late, None if unknown."""
        kind, since_s = self._now
        return self._clock() - since_s, None if kind is None else self._usual_s.get(kind)
