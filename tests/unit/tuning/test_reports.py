"""Metrics are lines of JSON, one a step; curves are a picture, and thinned where they are kept in short."""

import json
from pathlib import Path

import pytest

from tuning import reports
from tuning.records import HistoryPoint
from tuning.reports import MAX_CURVE_POINTS, PlotsUnavailableError, plot_curves, thin_curve, write_metrics


def history(count: int, *, every: int = 5) -> list[HistoryPoint]:
    return [
        HistoryPoint(
            step=step,
            loss=1 / step,
            grad_norm=0.5,
            learning_rate=0.01,
            validation_loss=2 / step if step % every == 0 else None,
        )
        for step in range(1, count + 1)
    ]


def test_each_step_is_a_line_and_evaluations_follow(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", history(5), {"prompt": {"loss": 0.25}})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"kind": "step", "step": 1, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 0.01}
    assert lines[4] == lines[4] | {"step": 5, "validation_loss": 0.4}
    assert lines[5:] == [{"kind": "evaluation", "of": "prompt", "loss": 0.25}]


@pytest.mark.parametrize("count", [0, 1, MAX_CURVE_POINTS, MAX_CURVE_POINTS + 1, 1000])
def test_thinned_curve_keeps_its_end_and_its_mean(count: int) -> None:
    points = history(count)
    curve = thin_curve(points)
    assert len(curve) <= MAX_CURVE_POINTS
    if count:
        assert curve[-1]["step"] == count
        sizes = [int(b["step"] - a["step"]) for a, b in zip([{"step": 0}, *curve], curve, strict=False)]
        total = sum(size * point["loss"] for size, point in zip(sizes, curve, strict=True))
        assert total == pytest.approx(sum(point.loss for point in points), abs=1e-5 * count)
    if count >= 5:
        last = max(point.step for point in points if point.validation_loss is not None)
        assert [p["validation_loss"] for p in curve if "validation_loss" in p][-1] == pytest.approx(2 / last, abs=1e-5)


def test_curves_are_a_png_with_and_without_validation(tmp_path: Path) -> None:
    for name, every in (("with", 5), ("without", 1000)):
        plot_curves(tmp_path / f"{name}.png", "capitals", history(20, every=every), best_step=15)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlotsUnavailableError, match=r"promptmux\[train\]"):
        reports.require_matplotlib()
