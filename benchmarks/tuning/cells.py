"""The cells of the comparison: which there are, in which order they are made, and what decides each one's figures.

Owns identity. A cell's key says what it is; its fingerprint covers everything else that its figures depend on (the
recipe, the data, the backbone), so that a line made under other conditions is never taken for this one. Refuses to know
how a cell is made.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tuning.config import INITS, LEARNING_RATES, Method

NO_PROMPT = "none"
TEXTS = (NO_PROMPT, "instruction-plain", "instruction-chat", "few-shot-plain", "few-shot-chat")
"""What people write to a frozen model. Only the few-shot forms draw something: which examples are shown."""
DRAWN_TEXTS = ("few-shot-plain", "few-shot-chat")
PROMPTS: Final[tuple[Method, ...]] = ("prompt_tuning", "prefix_tuning", "p_tuning_v2")
LORA, FULL = "lora", "full"
WEIGHTS = (LORA, FULL)
LATENCY = "latency"
METHODS = (*TEXTS, *PROMPTS, *WEIGHTS, LATENCY)

K = 20
SWEEP = (1, 5, 50, 100)
"""Beside `K`, which every method has."""
SWEPT = (("prompt_tuning", "vocab"), ("p_tuning_v2", None))
FULL_TASKS = ("word-sentiment", "number-words")
"""Full fine-tuning takes longest and needs most memory: one classification and one generation task have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure of the tables. What a method does not have is None: `init` and `k` of texts, `seed` of fixed texts.

    `init` is None too where the method has one beginning here. A latency cell's `form` is what precedes the items: a
    text method, or `k` vectors.
    """

    task: str
    method: str
    init: str | None = None
    k: int | None = None
    seed: int | None = None
    form: str | None = None

    @property
    def key(self) -> str:
        """Unique, readable, and fit for a file's name once its slashes are replaced."""
        parts = [self.task, self.method, self.form, self.init]
        parts += [None if self.k is None else f"k{self.k}", None if self.seed is None else f"seed{self.seed}"]
        return "/".join(part for part in parts if part is not None)

    @property
    def slug(self) -> str:
        return self.key.replace("/", "--")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all cells of a method share. Beginnings and learning rates of prompts are the trainer's usual ones."""

    num_steps: int = 150
    batch_size: int = 16
    eval_every: int = 25
    num_warmup_steps: int = 10
    num_shots: int = 8
    lora_rank: int = 8
    lora_learning_rate: float = 1e-3
    full_learning_rate: float = 5e-5
    num_latency_items: int = 24
    num_latency_tokens: int = 8

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The part that decides this cell's figures."""
        training = {
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "eval_every": self.eval_every,
            "num_warmup_steps": self.num_warmup_steps,
        }
        for method in PROMPTS:
            if cell.method == method:
                return training | {"learning_rate": LEARNING_RATES[method], "init": cell.init or INITS[method][0]}
        if cell.method == LORA:
            return training | {"rank": self.lora_rank, "learning_rate": self.lora_learning_rate}
        if cell.method == FULL:
            return training | {"learning_rate": self.full_learning_rate}
        if cell.method == LATENCY:
            texts = {"num_shots": self.num_shots} if cell.form in DRAWN_TEXTS else {}
            return texts | {"num_items": self.num_latency_items, "num_new_tokens": self.num_latency_tokens}
        return {"num_shots": self.num_shots} if cell.method in DRAWN_TEXTS else {}


def fingerprint(cell: Cell, recipe: Recipe, *, data_digest: str, backbone_digest: str, dtype: str) -> str:
    """SHA-256 (hex) over all that decides the cell's figures, apart from the machine's rounding."""
    parts = [dataclasses.asdict(cell), recipe.settings(cell), data_digest, backbone_digest, dtype]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan(tasks: Sequence[str], seeds: Sequence[int], labels: Mapping[str, Sequence[str]]) -> list[Cell]:
    """All cells, the most telling first: every method once at k=20, then more seeds, the sweep of k, full fine-tuning.

    `labels` says which tasks are classification: their prompts also begin from the labels, those of the others from
    the instruction's text.
    """
    cells: list[Cell] = []
    for number, seed in enumerate(seeds):
        cells += _each(tasks, [_text(method, seed) for method in TEXTS if number == 0 or method in DRAWN_TEXTS])
        cells += _each(tasks, [Cell(task="", method="prompt_tuning", init="vocab", k=K, seed=seed)])
        for method in ("p_tuning_v2", "prefix_tuning"):
            cells += _each(tasks, [Cell(task="", method=method, k=K, seed=seed)])
        cells += [
            Cell(task=task, method="prompt_tuning", init="labels" if labels.get(task) else "text", k=K, seed=seed)
            for task in tasks
        ]
        cells += _each(tasks, [Cell(task="", method="prompt_tuning", init="random", k=K, seed=seed)])
        cells += _each(tasks, [Cell(task="", method=LORA, seed=seed)])
        if number == 0:
            cells += _latency(tasks, seed)
    for seed in seeds:
        for method, init in SWEPT:
            cells += [
                Cell(task=task, method=method, init=init, k=k, seed=seed) for k in sorted(SWEEP) for task in tasks
            ]
    cells += [Cell(task=task, method=FULL, seed=seed) for seed in seeds for task in FULL_TASKS if task in tasks]
    return cells


def select(cells: Iterable[Cell], methods: Sequence[str]) -> Iterator[Cell]:
    """The cells of these methods, in order; all of them where none is named."""
    return (cell for cell in cells if not methods or cell.method in methods)


def _text(method: str, seed: int) -> Cell:
    return Cell(task="", method=method, seed=seed if method in DRAWN_TEXTS else None)


def _latency(tasks: Sequence[str], seed: int) -> list[Cell]:
    """What precedes the items, at one task: what a request costs depends on lengths alone."""
    forms = [Cell(task="", method=LATENCY, form=form, seed=seed if form in DRAWN_TEXTS else None) for form in TEXTS]
    forms += [Cell(task="", method=LATENCY, form="prompt", k=k) for k in sorted((K, *SWEEP))]
    return _each(tasks[:1], forms)


def _each(tasks: Sequence[str], patterns: Sequence[Cell]) -> list[Cell]:
    return [dataclasses.replace(pattern, task=task) for pattern in patterns for task in tasks]
