"""Two ways of computing the same steps, compared: are the answers the same, and which way is faster?

Owns the numbers of the steps of one size and what is made of them. Refuses to know what the two ways are.
"""

import statistics
from dataclasses import dataclass, field

import torch

NUM_STEPS = 12
_WORTH = 0.97
_USUAL, _FAR = 2.0, 5.0
_MASKED = -1e30
"""Logits below it, down to minus infinity, are a mask: tokens that the model never makes."""


@dataclass(slots=True)
class Trial:
    """Seconds and differences of the steps of one size that were computed both ways."""

    eager_s: list[float] = field(default_factory=list)
    compiled_s: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.differences) >= NUM_STEPS

    @property
    def is_faster(self) -> bool:
        """Judged step by step: steps of one size differ, and what else the machine does slows both ways of one step."""
        return statistics.median(c / e for c, e in zip(self.compiled_s, self.eager_s, strict=True)) < _WORTH

    def add(self, *, eager_s: float, compiled_s: float, difference: float) -> None:
        self.eager_s.append(eager_s)
        self.compiled_s.append(compiled_s)
        self.differences.append(difference)

    def fault(self, tolerance: float) -> str | None:
        """Why the answers are not the same, or None. `tolerance` is for many rows together.

        A single row may lie farther off by rounding alone, so one step is given more room than their median.
        """
        # Written so that NaN is a fault.
        if any(not difference <= _FAR * tolerance for difference in self.differences):
            worst = max(difference for difference in self.differences if not difference <= _FAR * tolerance)
            return f"logits differ by {worst:.1e} in one step (allowed {_FAR * tolerance:.0e})"
        if self.is_over and not statistics.median(self.differences) <= _USUAL * tolerance:
            return f"logits usually differ by {statistics.median(self.differences):.1e} (allowed {tolerance:.0e})"
        return None


def difference_of_logits(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Root-mean-square difference of logits `[L, vocab_size]` over the expected ones' spread.

    Rows in which `expected` has no number (a prompt of NaN makes such) are left out; None when there is no other. A row
    that has numbers in `expected` alone, or masks other tokens, differs by infinity.
    """
    wide, other = expected.float(), found.float()
    # A row of nothing but masks has no token either.
    rows = ~(wide.isnan() | (wide == torch.inf)).any(dim=-1) & (wide > _MASKED).any(dim=-1)
    if not rows.any():
        return None
    wide, other = wide[rows], other[rows]
    taken = wide > _MASKED
    if not torch.equal(taken, other.abs() < -_MASKED) or not (other[~taken] <= _MASKED).all():
        return float("inf")
    wide, other = wide[taken], other[taken]
    spread = wide.std(correction=0).clamp_min(1e-6)
    return float((other - wide).square().mean().sqrt() / spread)
