"""Pictures of a load, as PNG files. matplotlib comes with the extra `bench`; importing this module works without it."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from server.bench.load import LoadResult
from server.bench.server_metrics import StepStats
from server.bench.summary import PERCENTILES, gaps, in_flight, time_to_first_token

_NUM_BINS = 60


class PlotsUnavailableError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def require_matplotlib() -> None:
    """Raises PlotsUnavailableError. Asked before a load is sent, and not after an hour of it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailableError("plots need matplotlib: pip install 'promptmux[bench]'")


def write_plots(folder: Path, result: LoadResult, steps: StepStats | None) -> list[Path]:
    """Writes latency.png, timeline.png and, where the engine's metrics were read, steps.png; returns their paths.

    Makes `folder`. Raises PlotsUnavailableError, and OSError when it cannot be written.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_latency(folder / "latency.png", result), _timeline(folder / "timeline.png", result)]
    if steps is not None:
        paths.append(_steps(folder / "steps.png", steps))
    return paths


def _figure(width: float, height: float) -> Any:
    # The object, not pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _latency(path: Path, result: LoadResult) -> Path:
    """The share of requests, or gaps, that took at most so long."""
    sound = [record for record in result.records if record.failure is None]
    panels = {
        "time to first token": [t for t in map(time_to_first_token, sound) if t is not None],
        "inter-token latency": [gap for record in sound for gap in gaps(record)],
        "end to end": [record.ended_s - record.due_s for record in sound],
    }
    figure = _figure(12, 3.8)
    for axes, (title, seconds) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.set(title=title, xlabel="ms", ylabel="share", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if seconds:
            axes.ecdf(np.asarray(seconds) * 1e3)
            for percentile in PERCENTILES:
                at_ms = float(np.percentile(seconds, percentile)) * 1e3
                axes.axvline(at_ms, linestyle=":", color="grey")
                axes.text(at_ms, 0.02, f"p{percentile} {at_ms:.3g}", rotation=90, fontsize=7, ha="right")
    figure.savefig(path)
    return path


def _timeline(path: Path, result: LoadResult) -> Path:
    """New tokens a second, and requests under way, from beginning to end."""
    records = result.records
    figure = _figure(9, 5)
    tokens_axes, requests_axes = figure.subplots(2, 1, sharex=True)
    tokens_axes.set(ylabel="new tokens/s")
    requests_axes.set(xlabel="s from the start", ylabel="requests under way")
    if records and result.wall_s > 0:
        edges = np.linspace(0, result.wall_s, _NUM_BINS + 1)
        counts, _ = np.histogram([t for record in records for t in record.token_times_s], edges)
        tokens_axes.stairs(counts / np.diff(edges), edges, fill=True, alpha=0.7)
        times, running = in_flight(records)
        requests_axes.step(times, running, where="post")
        failed_s = [record.ended_s for record in records if record.failure is not None]
        if failed_s:
            requests_axes.plot(failed_s, np.zeros(len(failed_s)), "rx", label="failed")
            requests_axes.legend()
    for axes in (tokens_axes, requests_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path)
    return path


def _steps(path: Path, steps: StepStats) -> Path:
    """A mean step, phase by phase."""
    figure = _figure(9, 2.2)
    axes = figure.subplots()
    left = 0.0
    for phase, seconds in steps.phases_s.items():
        width = seconds / steps.num_steps * 1e3
        axes.barh([""], [width], left=left, label=f"{phase} {width:.2f} ms")
        left += width
    axes.set(xlabel="ms", title=f"a mean step of {steps.num_steps}: {steps.mean_rows:.1f} rows")
    axes.legend(ncols=max(len(steps.phases_s), 1), loc="upper center", bbox_to_anchor=(0.5, -0.4), frameon=False)
    figure.savefig(path)
    return path
