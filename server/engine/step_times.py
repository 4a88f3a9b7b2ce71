"""How long steps take, learned from those that were done: a base, and so much more for each row and each further token.

A step takes about `base + per_row * rows + per_token * (tokens - rows)` seconds: on a CPU most of it follows what is
computed, on a GPU nearly none of it does. Whoever wants to keep a step short asks here what that would gain, and need
not know the device. The three numbers follow the steps by a Kalman filter whose state is them (Kalman 1960): they are
taken to drift, so that a machine whose speed changes is followed within some tens of steps, and what steps of late do
not tell (how long one of many rows takes, while one row runs alone) is kept from earlier ones.

Refuses to know rows, tenants and what a step is kept short for. Only the engine thread touches it.
"""

import numpy as np
import numpy.typing as npt

MIN_STEPS = 16
"""What fewer steps say is not taken for knowledge."""

# Of what a step takes: how far single steps are off, and how far each of the numbers drifts from step to step. So a
# step during which the machine stood still says little.
_NOISE = 0.1
_DRIFT = 0.004
# How far off the numbers may be at first.
_DOUBT = 10.0
# Rows and further tokens that take about as long as the base: so the three numbers are of one size.
_ROWS_A_BASE, _TOKENS_A_BASE = 16.0, 64.0

FloatArray = npt.NDArray[np.float64]


class StepTimes:
    """Seconds of a step, by its rows and tokens."""

    def __init__(self) -> None:
        self._num_steps = 0
        # Seconds of the base, of _ROWS_A_BASE rows, of _TOKENS_A_BASE further tokens; and how they vary together.
        self._parts: FloatArray = np.zeros(3)
        self._doubt: FloatArray = np.zeros((3, 3))

    @property
    def is_known(self) -> bool:
        return self._num_steps >= MIN_STEPS

    @property
    def base_s(self) -> float:
        """What a step takes however little it computes."""
        return float(self._parts[0])

    def add(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step of so many rows, with so many tokens together, took so long."""
        expected_s = self.of(num_rows, num_tokens)
        if not self._num_steps:
            self._doubt = np.eye(3) * (_DOUBT * seconds) ** 2
        self._num_steps += 1
        inputs = np.array([1.0, num_rows / _ROWS_A_BASE, (num_tokens - num_rows) / _TOKENS_A_BASE])
        doubt = self._doubt @ inputs
        gain = doubt / (inputs @ doubt + (_NOISE * seconds) ** 2)
        self._parts = np.maximum(self._parts + gain * (seconds - expected_s), 0.0)
        self._doubt += np.eye(3) * (_DRIFT * seconds) ** 2 - np.outer(gain, doubt)

    def of(self, num_rows: int, num_tokens: int) -> float:
        """Seconds that such a step is expected to take."""
        base_s, rows_s, tokens_s = self._parts.tolist()
        return float(base_s + rows_s * num_rows / _ROWS_A_BASE + tokens_s * (num_tokens - num_rows) / _TOKENS_A_BASE)

    def of_one_more_row(self, num_tokens: int) -> float:
        """Seconds by which a step becomes longer by a row with so many tokens."""
        return self.of(1, num_tokens) - self.base_s if num_tokens > 0 else 0.0

    def num_tokens_within(self, seconds: float, at_most: int) -> int:
        """How many tokens of one more row lengthen a step by no more than this; 0 when one is too much."""
        left_s = seconds - self.of_one_more_row(1)
        if left_s < 0:
            return 0
        per_token_s = float(self._parts[2]) / _TOKENS_A_BASE
        if left_s >= per_token_s * (at_most - 1):
            return at_most
        return 1 + int(left_s / per_token_s)
