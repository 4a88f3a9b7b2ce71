"""Pictures of the comparison, as small SVG files that are the same for the same figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tuning.cells import SWEEP, SWEPT, K
from benchmarks.tuning.figures import MAIN_VARIANTS, Results, Variant, median_of

METHODS_PLOT, PARAMETERS_PLOT, SWEEP_PLOT = "tuning-methods.svg", "tuning-parameters.svg", "tuning-k.svg"
TITLES = {"prompt_tuning": "prompt tuning, from the vocabulary", "p_tuning_v2": "P-Tuning v2"}


def write_plots(folder: Path, results: Results) -> list[Path]:
    """Write what there are figures for; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if results.tasks:
        paths.append(_methods(folder / METHODS_PLOT, results))
        paths.append(_parameters(folder / PARAMETERS_PLOT, results))
    if any(results.of_variants([(method, init, k)]) for method, init in SWEPT for k in SWEEP):
        paths.append(_sweep(folder / SWEEP_PLOT, results))
    return paths


def _methods(path: Path, results: Results) -> Path:
    """Exact match of each method, a panel a task; bars are the spread over seeds."""
    tasks = results.tasks
    names = list(MAIN_VARIANTS)
    figure = _figure(2.6 + 1.7 * len(tasks), 3.6)
    for axes, task in zip(_row(figure, len(tasks)), tasks, strict=True):
        axes.set(title=task, xlim=(-0.05, 1.05), ylim=(len(names) - 0.5, -0.5))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for place, name in enumerate(names):
            found = results.exact_match(MAIN_VARIANTS[name], task)
            if found is not None:
                axes.errorbar(found.mean, place, xerr=found.spread, fmt="o", color=_color(name), capsize=2, ms=4)
    figure.supxlabel("exact match on test items", fontsize=9)
    return _save(figure, path)


def _sweep(path: Path, results: Results) -> Path:
    """Exact match by k, a panel a method, a line a task."""
    figure = _figure(9, 3.4)
    ks = sorted((K, *SWEEP))
    lines: dict[str, Any] = {}
    for axes, (method, init) in zip(_row(figure, len(SWEPT)), SWEPT, strict=True):
        axes.set(title=TITLES[method], xlabel="k (virtual tokens)", xscale="log", ylim=(-0.05, 1.05))
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        for place, task in enumerate(results.tasks):
            found = {k: results.exact_match([(method, init, k)], task) for k in ks}
            points = [(k, one.mean, one.spread or 0.0) for k, one in found.items() if one is not None]
            if points:
                lines[task] = axes.errorbar(
                    *zip(*points, strict=True), fmt="o-", color=f"C{place}", capsize=2, ms=3, lw=1
                )
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=7)
    figure.supylabel("exact match", fontsize=9)
    return _save(figure, path)


def _parameters(path: Path, results: Results) -> Path:
    """Mean exact match over the tasks that all trained methods have, by trained parameters."""
    figure = _figure(7, 3.4)
    (axes,) = _row(figure, 1)
    axes.set(
        xscale="log", xlabel="trained parameters of a task", ylabel="exact match, mean of tasks", ylim=(-0.05, 1.05)
    )
    axes.grid(alpha=0.3)
    for (name, (parameters, score)), marker in zip(_trained(results).items(), "o^sDvP*X", strict=False):
        axes.plot(parameters, score, marker, color=_color(name), label=name)
    if axes.has_data():
        figure.legend(loc="outside right upper", fontsize=7)
    return _save(figure, path)


def _trained(results: Results) -> Mapping[str, tuple[float, float]]:
    trained: dict[str, tuple[float, float]] = {}
    for name, variants in MAIN_VARIANTS.items():
        parameters = _num_parameters(results, variants)
        score = results.mean_over(results.tasks, variants)
        if parameters is not None and score is not None:
            trained[name] = (parameters, score)
    return trained


def _num_parameters(results: Results, variants: Sequence[Variant]) -> float | None:
    return median_of(results.of_variants(variants), lambda r: r.training.num_parameters if r.training else None)


def _color(name: str) -> str:
    if name.startswith("prompt tuning"):
        return "tab:blue"
    if name in ("prefix tuning", "P-Tuning v2"):
        return "tab:green"
    return "tab:red" if name in ("LoRA", "full fine-tuning") else "tab:gray"


def _row(figure: Any, count: int) -> list[Any]:
    return list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _figure(width: float, height: float) -> Any:
    # The object, not pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import rc_context

    # Else every file would differ: identifiers are random and the date is written into it.
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path
