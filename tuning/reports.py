"""What a training leaves behind for people and programs: its metrics as JSON lines, its curves as a picture.

Owns both formats (docs/training.md describes them). matplotlib comes with the extra `train`; importing this module
works without it. Refuses to know how figures are made.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tuning.records import HistoryPoint

METRICS_FILE: Final = "metrics.jsonl"
CURVES_FILE: Final = "curves.png"
# Curves in a prompt's provenance are thinned to so many points.
MAX_CURVE_POINTS: Final = 40


class PlotsUnavailableError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def require_matplotlib() -> None:
    """Raises PlotsUnavailableError. Asked before a training begins, and not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailableError("plots need matplotlib: pip install 'promptmux[train]'")


def write_metrics(path: Path, history: Sequence[HistoryPoint], evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """A line a step, then a line for each of `evaluations` (what was evaluated: its figures)."""
    lines: list[dict[str, Any]] = [
        {
            "kind": "step",
            "step": point.step,
            "loss": point.loss,
            "grad_norm": point.grad_norm,
            "learning_rate": point.learning_rate,
        }
        | ({} if point.validation_loss is None else {"validation_loss": point.validation_loss})
        for point in history
    ]
    lines += [{"kind": "evaluation", "of": name, **figures} for name, figures in evaluations.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def thin_curve(history: Sequence[HistoryPoint]) -> list[dict[str, float | int]]:
    """Some of the points, evenly: each step's loss as the mean since the point before, and validation losses."""
    if not history:
        return []
    size = -(-len(history) // MAX_CURVE_POINTS)
    curve: list[dict[str, float | int]] = []
    for start in range(0, len(history), size):
        part = history[start : start + size]
        point: dict[str, float | int] = {
            "step": part[-1].step,
            "loss": round(sum(one.loss for one in part) / len(part), 5),
        }
        known = [one.validation_loss for one in part if one.validation_loss is not None]
        if known:
            point["validation_loss"] = round(known[-1], 5)
        curve.append(point)
    return curve


def plot_curves(path: Path, name: str, history: Sequence[HistoryPoint], *, best_step: int | None = None) -> None:
    """Losses by step, and under them learning rate and gradient norm. Raises PlotsUnavailableError."""
    require_matplotlib()
    # The object, not pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [point.step for point in history]
    losses.set(title=name, ylabel="loss (nats a token)")
    losses.plot(steps, [point.loss for point in history], lw=0.8, alpha=0.7, label="training")
    measured = [(point.step, point.validation_loss) for point in history if point.validation_loss is not None]
    if measured:
        losses.plot(*zip(*measured, strict=True), marker="o", ms=3, label="validation")
    if best_step is not None:
        losses.axvline(best_step, ls=":", c="grey", label=f"kept: step {best_step}")
    losses.set_ylim(bottom=0)
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(steps, [point.learning_rate for point in history], c="tab:green")
    rates.set(xlabel="step", ylabel="learning rate")
    norms = rates.twinx()
    norms.plot(steps, [point.grad_norm for point in history], lw=0.6, alpha=0.5, c="tab:red")
    norms.set(ylabel="gradient norm")
    figure.savefig(path)
