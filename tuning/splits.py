"""A task's data: its files read, split into training, validation and test examples, and known by a digest.

Nothing here depends on the order of a file's lines: examples are put in an order of their own, by a hash of their
content and the seed, so that the same examples give the same split, the same digest and the same training. Examples
with the same prompt stay together, so that a split made here never holds out what was trained on.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuning.examples import DataError, Example, Problem, TaskData

DEFAULT_SHARE: Final = 0.1
# More held-out examples make a figure hardly surer, and the largest sets would take longer to answer than to train.
MAX_HELD_OUT: Final = 1000

ReadFile = Callable[[Path], Sequence[Example]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFiles:
    """Where a task's examples are. What has no file of its own is split off `train`: a share of its prompts.

    A share of 0 holds nothing out.
    """

    train: Path
    validation: Path | None = None
    test: Path | None = None
    validation_share: float = DEFAULT_SHARE
    test_share: float = DEFAULT_SHARE

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"{name}: must be at least 0 and below 0.5")


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """`notes` say what is odd in the data though it can be used: repetitions, contradictions, unseen labels."""

    data: TaskData
    notes: tuple[str, ...]


def load_task(name: str, files: DataFiles, read: ReadFile, *, seed: int) -> LoadedTask:
    """Read and split a task's examples. Raises DataError, also where too few are there to hold some out."""
    notes: list[str] = []
    held_out: dict[str, tuple[Example, ...]] = {}
    given, shares = {"validation": files.validation, "test": files.test}, {}
    train = _without_repetitions(read(files.train), "training", notes)
    for part, path in given.items():
        if path is None:
            shares[part] = files.test_share if part == "test" else files.validation_share
        else:
            held_out[part] = _in_order(_without_repetitions(read(path), part, notes), seed)
    rest, split_off = _split(train, shares, seed, files.train)
    held_out |= split_off
    _note_oddities(rest, held_out, notes)
    parts = {"train": _in_order(rest, seed)} | {part: held_out[part] for part in given}
    labels = {example.label for part in parts.values() for example in part if example.label is not None}
    data = TaskData(
        name=name,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        labels=tuple(sorted(labels)),
        digest=data_digest(parts),
    )
    return LoadedTask(data, tuple(notes))


def data_digest(parts: Mapping[str, Iterable[Example]]) -> str:
    """SHA-256 in hexadecimal over the parts' names and examples, whatever the order of the examples in a part."""
    digest = hashlib.sha256()
    for part, examples in parts.items():
        digest.update(f"{part}\n".encode())
        for key in sorted(_content_key(example) for example in examples):
            digest.update(key)
    return digest.hexdigest()


def _split(
    examples: Sequence[Example], shares: Mapping[str, float], seed: int, path: Path
) -> tuple[list[Example], dict[str, tuple[Example, ...]]]:
    """What is left for training, and the parts that were split off."""
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    prompts = sorted(by_prompt, key=lambda prompt: _key(seed, prompt))
    parts: dict[str, tuple[Example, ...]] = {}
    used = 0
    for part, share in shares.items():
        num_held_out = min(MAX_HELD_OUT, math.ceil(share * len(prompts)))
        chosen = prompts[used : used + num_held_out]
        used += num_held_out
        parts[part] = _in_order([example for prompt in chosen for example in by_prompt[prompt]], seed)
    if used >= len(prompts):
        message = (
            f"holds {len(prompts)} different prompts, too few to hold {used} of them out; add examples, or give the "
            "validation and test examples in files of their own"
        )
        raise DataError([Problem(str(path), None, None, message)])
    return [example for prompt in prompts[used:] for example in by_prompt[prompt]], parts


def _without_repetitions(examples: Sequence[Example], part: str, notes: list[str]) -> list[Example]:
    kept: dict[Example, None] = dict.fromkeys(examples)
    num_repeated = len(examples) - len(kept)
    if num_repeated:
        notes.append(f"{num_repeated} of {len(examples)} {part} examples repeat another one; each is used once")
    return list(kept)


def _note_oddities(train: Sequence[Example], held_out: Mapping[str, Sequence[Example]], notes: list[str]) -> None:
    answers: dict[str, Example] = {}
    contradictions = [example for example in train if answers.setdefault(example.prompt, example) != example]
    if contradictions:
        first = contradictions[0]
        notes.append(
            f"{len(contradictions)} training examples give a prompt another completion than an earlier example does "
            f"(first: {first.file}:{first.line})"
        )
    trained_labels = {example.label for example in train if example.label is not None}
    for part, examples in held_out.items():
        known = [example for example in examples if example.prompt in answers]
        if known:
            notes.append(
                f"{len(known)} of {len(examples)} {part} prompts are in the training data too "
                f"(first: {known[0].file}:{known[0].line}): figures on them say little"
            )
        if part == "test":
            chosen_by = {example.prompt for example in held_out["validation"]}
            seen = [example for example in examples if example.prompt in chosen_by]
            if seen:
                notes.append(
                    f"{len(seen)} of {len(examples)} test prompts are among the validation examples too "
                    f"(first: {seen[0].file}:{seen[0].line}), by which the prompt that is kept is chosen"
                )
        unseen = sorted({example.label for example in examples if example.label is not None} - trained_labels)
        if unseen:
            notes.append(f"labels of the {part} examples that no training example has: {', '.join(unseen[:10])}")


def _in_order(examples: Iterable[Example], seed: int) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda example: hashlib.sha256(_content_key(example) + b"%d" % seed).digest()))


def _key(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _content_key(example: Example) -> bytes:
    content = [example.prompt, example.completion, example.label, example.is_rendered]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).digest()
