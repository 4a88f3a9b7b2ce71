"""What a run of the queue is told: where things are, and how far it may go."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tuning.cells import Recipe


class DeadlineReached(Exception):  # noqa: N818 - no error: what was reached is kept
    """The time is over; what is under way goes on at the next run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`folder` holds splits, trained prompts and what unfinished training left; `ledger` is the file of results.

    `together` prompts at most are trained in one pass. `deadline_s` is of the monotonic clock, None: no deadline.
    """

    backbone: str
    dtype: torch.dtype
    num_threads: int
    folder: Path
    ledger: Path
    recipe: Recipe
    together: int = 6
    max_tokens_per_pass: int = 4096
    activation_checkpointing: bool = False
    checkpoint_every: int = 10
    deadline_s: float | None = None

    @property
    def data_folder(self) -> Path:
        return self.folder / "data"

    @property
    def runs_folder(self) -> Path:
        return self.folder / "runs"

    @property
    def prompts_folder(self) -> Path:
        return self.folder / "prompts"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def check_deadline(self) -> None:
        """Raises DeadlineReached."""
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise DeadlineReached
