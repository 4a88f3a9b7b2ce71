"""Finished cells as numbers to be tabled: by method and task, with how many seeds and how much they differ.

Owns what a mean and a spread are here, and which findings of papers the figures are held against. Refuses to know
markdown and pictures.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.tuning.cells import DRAWN_TEXTS, LORA, TEXTS, Cell, K
from benchmarks.tuning.ledger import Record

Variant = tuple[str, str | None, int | None]
"""Method, beginning and k: a row of the tables."""

MAIN_VARIANTS: Mapping[str, Sequence[Variant]] = {
    "no prompt": [("none", None, None)],
    "instruction, plain": [("instruction-plain", None, None)],
    "instruction, chat": [("instruction-chat", None, None)],
    "few-shot, plain": [("few-shot-plain", None, None)],
    "few-shot, chat": [("few-shot-chat", None, None)],
    "prompt tuning, random": [("prompt_tuning", "random", K)],
    "prompt tuning, vocabulary": [("prompt_tuning", "vocab", K)],
    # One beginning of the same kind: the words that answers are made of, else those that say what to do.
    "prompt tuning, labels or instruction": [("prompt_tuning", "labels", K), ("prompt_tuning", "text", K)],
    "prefix tuning": [("prefix_tuning", None, K)],
    "P-Tuning v2": [("p_tuning_v2", None, K)],
    "LoRA": [(LORA, None, None)],
    "full fine-tuning": [("full", None, None)],
}


@dataclass(frozen=True, slots=True)
class Figure:
    """The mean over `count` seeds and their sample standard deviation, None for a single one."""

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure | None":
        """None for no values."""
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:.2f}{spread} ({self.count})"


class Results:
    """Records by cell; of two records of one cell the one that was made later counts."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = {record.key: record for record in records}

    @property
    def tasks(self) -> list[str]:
        """Those with scores, in the order in which they were first finished."""
        return list(dict.fromkeys(record.cell.task for record in self.records.values() if record.scores))

    def of_variants(self, variants: Sequence[Variant], task: str | None = None) -> list[Record]:
        """Records with scores of these variants, of one task or all."""
        return [
            record
            for record in self.records.values()
            if record.scores is not None
            and (record.cell.method, record.cell.init, record.cell.k) in variants
            and task in (None, record.cell.task)
        ]

    def exact_match(self, variants: Sequence[Variant], task: str) -> Figure | None:
        records = self.of_variants(variants, task)
        return Figure.of([record.scores.exact_match for record in records if record.scores is not None])

    def label_accuracy(self, variants: Sequence[Variant], task: str) -> Figure | None:
        found = [record.scores.label_accuracy for record in self.of_variants(variants, task) if record.scores]
        return Figure.of([value for value in found if value is not None])

    def mean_over(self, tasks: Sequence[str], variants: Sequence[Variant]) -> float | None:
        """The mean of the tasks' means of exact match; None unless every task has one."""
        figures = [self.exact_match(variants, task) for task in tasks]
        means = [figure.mean for figure in figures if figure is not None]
        return statistics.fmean(means) if means and len(means) == len(tasks) else None

    def missing(self, planned: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in planned if cell.key not in self.records]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a paper found, put as: the first is `at_least` as good as the second. Both are rows of the main table."""

    paper: str
    claim: str
    better: Sequence[Variant]
    worse: Sequence[Variant]
    is_close: bool = False
    """The claim is that the two are level, rather than that the first is better."""


PROMPT_VOCAB = [("prompt_tuning", "vocab", K)]
FINDINGS = (
    Finding(
        "Lester et al. 2021, fig. 3b",
        "prompt tuning from the vocabulary beats a random beginning, in models that are not huge",
        PROMPT_VOCAB,
        MAIN_VARIANTS["prompt tuning, random"],
    ),
    Finding(
        "Lester et al. 2021, fig. 3b",
        "class labels are the best beginning (here for classification alone)",
        [("prompt_tuning", "labels", K)],
        PROMPT_VOCAB,
    ),
    Finding(
        "Lester et al. 2021, fig. 3a",
        "a prompt of one vector is worse than one of 20",
        PROMPT_VOCAB,
        [("prompt_tuning", "vocab", 1)],
    ),
    Finding(
        "Lester et al. 2021, fig. 3a",
        "beyond 20 vectors little is gained",
        [("prompt_tuning", "vocab", 100)],
        PROMPT_VOCAB,
        is_close=True,
    ),
    Finding(
        "Lester et al. 2021, fig. 1",
        "in small models full fine-tuning beats prompt tuning",
        MAIN_VARIANTS["full fine-tuning"],
        PROMPT_VOCAB,
    ),
    Finding(
        "Lester et al. 2021, fig. 1",
        "prompt tuning beats a prompt in words",
        PROMPT_VOCAB,
        MAIN_VARIANTS["few-shot, plain"],
    ),
    Finding(
        "Liu et al. 2022 (P-Tuning v2), table 2",
        "in small models deep prompts beat prompt tuning",
        MAIN_VARIANTS["P-Tuning v2"],
        PROMPT_VOCAB,
    ),
    Finding(
        "Liu et al. 2022 (P-Tuning v2), table 2",
        "deep prompts are level with full fine-tuning",
        MAIN_VARIANTS["P-Tuning v2"],
        MAIN_VARIANTS["full fine-tuning"],
        is_close=True,
    ),
    Finding(
        "Li & Liang 2021, section 7.2",
        "prefixes in every layer beat vectors in the input alone",
        MAIN_VARIANTS["prefix tuning"],
        PROMPT_VOCAB,
    ),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the differences of two rows over the tasks that have both, and the error of that mean.

    A task's own error has two parts: what the seeds differ by, and that its test items are a sample.
    """

    mean: float
    error: float
    tasks: Sequence[str]

    def verdict(self, *, is_close: bool) -> str:
        """What the figures say of a claim; two errors either way are called noise."""
        if abs(self.mean) <= 2 * self.error:
            return "level, within noise" if is_close else "not to be told apart"
        if is_close:
            return "disagree: not level"
        return "agree" if self.mean > 0 else "disagree"


def difference(results: Results, better: Sequence[Variant], worse: Sequence[Variant]) -> Difference | None:
    """None where no task has both rows."""
    means, errors, tasks = [], [], []
    for task in results.tasks:
        first, second = results.exact_match(better, task), results.exact_match(worse, task)
        if first is None or second is None:
            continue
        num_test = results.of_variants(better, task)[0].data.num_test
        means.append(first.mean - second.mean)
        errors.append(math.hypot(_error(first, num_test), _error(second, num_test)))
        tasks.append(task)
    if not tasks:
        return None
    return Difference(statistics.fmean(means), math.hypot(*errors) / len(tasks), tasks)


def _error(figure: Figure, num_test: int) -> float:
    of_items = math.sqrt(max(figure.mean * (1 - figure.mean), 0.25 / num_test) / num_test)
    of_seeds = 0.0 if figure.spread is None else figure.spread / math.sqrt(figure.count)
    return math.hypot(of_items, of_seeds)


def median_of(records: Iterable[Record], value: Callable[[Record], float | None]) -> float | None:
    """The median of what the records have of a value; None where none has it."""
    found = [number for number in map(value, records) if number is not None]
    return statistics.median(found) if found else None


def is_fixed_text(method: str) -> bool:
    """Whether nothing of the method depends on a seed."""
    return method in TEXTS and method not in DRAWN_TEXTS
