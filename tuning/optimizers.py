"""A prompt's own optimizer, its learning rate at a step, and the order of its examples: functions of the step alone.

Nothing here counts: who goes on from step n gets what an uninterrupted run had there.
"""

import math
import random
from collections.abc import Iterator

import torch

from tuning.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018), which Lester et al. used.

    The learning rate is set anew at every step.
    """
    rate = config.usual_learning_rate
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The rate of a step's update, steps counted from 0: warm-up, then the schedule, which ends near 0."""
    rate = config.usual_learning_rate
    if step < config.num_warmup_steps:
        return rate * (step + 1) / config.num_warmup_steps
    if config.schedule == "constant":
        return rate
    left = (config.num_steps - step) / max(1, config.num_steps - config.num_warmup_steps)
    if config.schedule == "linear":
        return rate * left
    return rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))


class DataOrder:
    """Which examples a step has: every example once, in an order of its own, before any comes again."""

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._round: tuple[int, list[int]] | None = None

    def batch(self, step: int) -> list[int]:
        """Places of the step's examples, steps counted from 0."""
        first = step * self._batch_size
        return [self._place(count) for count in range(first, first + self._batch_size)]

    def batches(self, num_steps: int) -> Iterator[list[int]]:
        """Those of the first steps, one after the other."""
        return (self.batch(step) for step in range(num_steps))

    def _place(self, count: int) -> int:
        number, offset = divmod(count, self._num_examples)
        if self._round is None or self._round[0] != number:
            places = list(range(self._num_examples))
            random.Random(f"{self._seed}:{number}").shuffle(places)  # noqa: S311 - reproducible, not a secret
            self._round = (number, places)
        return self._round[1][offset]
