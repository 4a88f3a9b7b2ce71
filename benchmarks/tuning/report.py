"""The page of results: tables made of the ledger, put between the markers of a page that is written by hand.

Owns what is tabled and how it is said. A figure stands there only if it was measured, with the number of seeds that it
is the mean of, and what is planned and missing is listed. Refuses to know how anything was measured.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.tuning.cells import LATENCY, SWEEP, SWEPT, Cell, K
from benchmarks.tuning.figures import FINDINGS, MAIN_VARIANTS, Results, Variant, difference, median_of
from benchmarks.tuning.ledger import Record
from benchmarks.tuning.plots import METHODS_PLOT, PARAMETERS_PLOT, SWEEP_PLOT, TITLES

NOTHING = "Nothing measured yet."
PICTURES = (
    ("accuracy", METHODS_PLOT, "Exact match by method and task"),
    ("costs", PARAMETERS_PLOT, "Exact match by the number of trained parameters"),
    ("sweep", SWEEP_PLOT, "Exact match by the number of virtual tokens"),
)
"""The block that each picture stands in."""
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z]+): [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


class PageError(ValueError):
    """The page has no such block, or not all of them."""


def fill_page(page: str, results: Results, planned: Sequence[Cell], *, images: str = "images") -> str:
    """The page with its blocks made anew; `images` is where its pictures are, as seen from it.

    Raises PageError unless it has each block once.
    """
    blocks = render_blocks(results, planned)
    for block, name, title in PICTURES:
        if blocks[block] != NOTHING:
            blocks[block] += f"\n\n![{title}]({images}/{name})"
    found = [match["name"] for match in _BLOCK.finditer(page)]
    if sorted(found) != sorted(blocks):
        raise PageError(f"the page has the blocks {', '.join(found)}; it must have {', '.join(blocks)}, each once")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match['name']]}\n\n{match[3]}", page)


def render_blocks(results: Results, planned: Sequence[Cell]) -> dict[str, str]:
    """Markdown by the block's name."""
    makers: Mapping[str, Callable[[], list[str]]] = {
        "provenance": lambda: _provenance(results),
        "tasks": lambda: _tasks(results),
        "accuracy": lambda: _accuracy(results),
        "labels": lambda: _labels(results),
        "costs": lambda: _costs(results),
        "latency": lambda: _latency(results),
        "sweep": lambda: _sweep(results),
        "papers": lambda: _papers(results),
        "missing": lambda: _missing(results, planned),
    }
    return {name: "\n".join(make() or [NOTHING]) for name, make in makers.items()}


def _provenance(results: Results) -> list[str]:
    records = list(results.records.values())
    if not records:
        return []
    dates = sorted(record.date for record in records)
    machines = Counter(
        f"{r.machine['gpu'] or r.machine['cpu']}, {r.machine['cores']} cores, {r.machine['torch_threads']} threads, "
        f"torch {r.machine['torch']}, transformers {r.machine['transformers']}, peft {r.machine['peft']}"
        for r in records
    )
    backbones = Counter(f"{record.backbone}, {record.dtype}" for record in records)
    commits = Counter(record.machine["commit"] for record in records)
    return [
        f"{len(records)} cells, made from {dates[0]} to {dates[-1]}.",
        "",
        *(f"- {count} cells: {text}" for counted in (backbones, machines) for text, count in counted.most_common()),
        f"- commits: {', '.join(f'{commit} ({count})' for commit, count in commits.most_common())}",
        *_recipes(records),
    ]


def _recipes(records: Iterable[Record]) -> list[str]:
    """What the cells of each method share; two lines for one method where they were not all made alike."""
    recipes: dict[str, Counter[str]] = {}
    for record in records:
        settings = ", ".join(f"{name} {value}" for name, value in sorted(record.settings.items()))
        if settings and record.cell.method != LATENCY:
            recipes.setdefault(settings, Counter())[record.cell.method] += 1
    return [
        f"- {', '.join(f'{method} ({count})' for method, count in sorted(methods.items()))}: {settings}"
        for settings, methods in recipes.items()
    ]


def _tasks(results: Results) -> list[str]:
    lines = ["| task | training | validation | test | labels | commonest answer |", "|---|--:|--:|--:|--:|--:|"]
    for task in results.tasks:
        data = next(record.data for record in results.records.values() if record.cell.task == task)
        lines.append(
            f"| {task} | {data.num_train} | {data.num_validation} | {data.num_test} | {data.num_labels or '–'} "
            f"| {data.majority_share:.2f} |"
        )
    return lines if results.tasks else []


def _accuracy(results: Results) -> list[str]:
    tasks = results.tasks
    if not tasks:
        return []
    lines = [f"| exact match | {' | '.join(tasks)} | mean |", f"|---|{'--:|' * (len(tasks) + 1)}"]
    for name, variants in MAIN_VARIANTS.items():
        cells = [_text(results.exact_match(variants, task)) for task in tasks]
        mean = results.mean_over(tasks, variants)
        lines.append(f"| {name} | {' | '.join(cells)} | {'–' if mean is None else f'{mean:.2f}'} |")
    return lines


def _labels(results: Results) -> list[str]:
    figures = {
        name: {task: results.label_accuracy(variants, task) for task in results.tasks}
        for name, variants in MAIN_VARIANTS.items()
    }
    tasks = [task for task in results.tasks if any(row[task] is not None for row in figures.values())]
    if not tasks:
        return []
    lines = [f"| label accuracy | {' | '.join(tasks)} |", f"|---|{'--:|' * len(tasks)}"]
    lines += [f"| {name} | {' | '.join(_text(row[task]) for task in tasks)} |" for name, row in figures.items()]
    return lines


def _costs(results: Results) -> list[str]:
    lines = [
        "| method | trained parameters | seconds a task | examples/s | trained at once | peak memory, MB | cells |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = dict(MAIN_VARIANTS)
    for method, init in SWEPT:
        rows |= {f"{TITLES[method]}, k={k}": [(method, init, k)] for k in SWEEP}
    for name, variants in rows.items():
        records = [record for record in results.of_variants(variants) if record.training and record.group]
        if records:
            lines.append(f"| {name} | {_cost(records)} | {len(records)} |")
    return lines if len(lines) > 2 else []


def _cost(records: Sequence[Record]) -> str:
    parameters = median_of(records, lambda r: r.training.num_parameters if r.training else None)
    seconds = median_of(records, lambda r: r.training.seconds if r.training else None)
    rate = median_of(records, lambda r: r.training.num_examples / r.training.seconds if r.training else None)
    together = sorted({len(record.group.keys) for record in records if record.group})
    memory = median_of(records, lambda r: r.group.peak_memory_mb if r.group else None)
    span = f"{together[0]}" if len(together) == 1 else f"{together[0]} to {together[-1]}"
    return f"{parameters:,.0f} | {seconds:.0f} | {rate:.1f} | {span} | {memory:,.0f}"


def _latency(results: Results) -> list[str]:
    lines = [
        "| before the item | text tokens | of them cached | first token, ms | whole request, ms | new tokens |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for record in results.records.values():
        found = record.latency
        if found is not None:
            cell = record.cell
            name = f"prompt of {cell.k} vectors" if cell.k is not None else cell.form
            lines.append(
                f"| {name} | {found.num_text_tokens} | {found.num_cached_tokens} | {found.first_token_ms:.1f} "
                f"| {found.whole_ms:.1f} | {found.num_new_tokens} |"
            )
    return lines if len(lines) > 2 else []


def _sweep(results: Results) -> list[str]:
    tasks, ks = results.tasks, sorted((K, *SWEEP))
    lines = []
    for method, init in SWEPT:
        if not any(results.of_variants([(method, init, k)]) for k in SWEEP):
            continue
        lines += ["", f"| {TITLES[method]} | {' | '.join(f'k={k}' for k in ks)} |", f"|---|{'--:|' * len(ks)}"]
        for task in tasks:
            cells = [_text(results.exact_match([(method, init, k)], task)) for k in ks]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines[1:]


def _papers(results: Results) -> list[str]:
    lines = ["| paper | finding | here: difference of exact match | tasks | |", "|---|---|--:|--:|---|"]
    for finding in FINDINGS:
        found = difference(results, finding.better, finding.worse)
        if found is None:
            lines.append(f"| {finding.paper} | {finding.claim} | – | – | not measured |")
            continue
        verdict = found.verdict(is_close=finding.is_close)
        figures = f"{found.mean:+.2f} ± {found.error:.2f}"
        lines.append(f"| {finding.paper} | {finding.claim} | {figures} | {len(found.tasks)} | {verdict} |")
    return lines


def _missing(results: Results, planned: Sequence[Cell]) -> list[str]:
    missing = results.missing(planned)
    if not missing:
        return ["Nothing: every planned cell is in the tables."]
    lines = [f"{len(missing)} of {len(planned)} planned cells were not made:", ""]
    groups: dict[Variant, list[Cell]] = {}
    for cell in missing:
        groups.setdefault((cell.method, cell.form or cell.init, cell.k), []).append(cell)
    for (method, beginning, k), cells in groups.items():
        name = ", ".join([method, *([beginning] if beginning else []), *([f"k={k}"] if k else [])])
        tasks = Counter(cell.task for cell in cells)
        lines.append(f"- {name}: {', '.join(f'{task} ({count})' for task, count in tasks.items())}")
    return lines


def _text(figure: object) -> str:
    return "–" if figure is None else str(figure)


def write_page(path: Path, results: Results, planned: Sequence[Cell], *, images: Path) -> None:
    """Make the page's tables anew. Raises PageError."""
    page = path.read_text(encoding="utf-8")
    where = Path(os.path.relpath(images, path.parent)).as_posix()
    path.write_text(fill_page(page, results, planned, images=where), encoding="utf-8")
