"""What is to be trained: one plan a task, from options or from a folder, and a plan made ready for the trainer.

A folder holds `NAME.jsonl` for each task, and where they are wanted `NAME.validation.jsonl`, `NAME.test.jsonl` and
`NAME.toml`, whose keys are those of `TrainConfig`, `template`, `validation_share` and `test_share`. Refuses to know how
anything is trained.
"""

import itertools
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from prompt_store.names import is_name
from tuning.config import ConfigError, TrainConfig, make_train_config
from tuning.encoding import encode_examples, encode_label
from tuning.examples import PLAIN_TEMPLATE, EncodedExample, Example, TaskData, check_template, read_examples
from tuning.records import TrainTask
from tuning.splits import DataFiles, load_task

SUFFIX: Final = ".jsonl"
VALIDATION_SUFFIX: Final = ".validation.jsonl"
TEST_SUFFIX: Final = ".test.jsonl"
_SPLIT_KEYS: Final = ("validation_share", "test_share")
_MAX_TOML_BYTES: Final = 1024 * 1024


class PlanError(ValueError):
    """A task cannot be planned as it is described; the message names the task or the file, and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """One task: its name, where its examples are, and how its prompt is trained."""

    name: str
    files: DataFiles
    config: TrainConfig
    template: str = PLAIN_TEMPLATE

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise PlanError(
                f"{self.name[:80]!r} is not a task's name: 1 to 63 characters of a-z, 0-9, '.', '_' and '-', starting "
                "with a letter or a digit, without '..'"
            )
        try:
            check_template(self.template)
        except ValueError as error:
            raise PlanError(f"{self.name}: template: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTask:
    """A plan with its examples read, split and tokenised. `held_out` is what the finished prompt is measured on."""

    plan: TaskPlan
    data: TaskData
    task: TrainTask
    held_out_part: str
    held_out: tuple[Example, ...]
    held_out_encoded: tuple[EncodedExample, ...]
    notes: tuple[str, ...] = field(default=())


def plan_folder(folder: Path, defaults: TaskPlan) -> list[TaskPlan]:
    """A plan for each task of a folder, in order of name. `defaults` is what a task's own file does not say.

    Raises PlanError.
    """
    if not folder.is_dir():
        raise PlanError(f"{folder} is not a folder")
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    helpers = {path for path in paths if path.name.endswith((VALIDATION_SUFFIX, TEST_SUFFIX))}
    names = [path.name.removesuffix(SUFFIX) for path in paths if path not in helpers]
    if not names:
        raise PlanError(f"{folder} holds no {SUFFIX} file; a task's examples are NAME{SUFFIX}")
    known = {folder / f"{name}{suffix}" for name in names for suffix in (VALIDATION_SUFFIX, TEST_SUFFIX)}
    for path in sorted((helpers - known) | {p for p in folder.glob("*.toml") if p.stem not in names}):
        raise PlanError(f"{path} belongs to no task: there is no {SUFFIX} file of its name")
    return [_plan_one(folder, name, defaults) for name in names]


def prepare_task(
    plan: TaskPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    truncates: bool = False,
) -> PreparedTask:
    """Read, split and tokenise a plan's examples. `max_tokens` is what the backbone takes, virtual tokens included.

    Raises DataError, and PlanError where the configuration does not suit the data.
    """
    read = partial(
        read_examples, template=plan.template, tokenizer=tokenizer if tokenizer.chat_template is not None else None
    )
    loaded = load_task(plan.name, plan.files, read, seed=plan.config.seed)
    data = loaded.data
    if plan.config.usual_init == "labels" and not data.labels:
        raise PlanError(f'{plan.name}: init: \'labels\' needs examples with labels, {{"text", "label"}}')
    if plan.config.patience is not None and not data.validation:
        raise PlanError(f"{plan.name}: patience: needs validation examples to look at")
    room = None if max_tokens is None else max_tokens - plan.config.num_virtual_tokens
    if room is not None and room < 2:
        raise PlanError(
            f"{plan.name}: num_virtual_tokens: {plan.config.num_virtual_tokens} leave no room for a text: the backbone "
            f"takes {max_tokens} tokens"
        )
    train, validation, test = _encode_parts(data, tokenizer, max_tokens=room, truncates=truncates)
    held_out_part, held_out, encoded = (
        ("test", data.test, test) if data.test else ("validation", data.validation, validation)
    )
    return PreparedTask(
        plan=plan,
        data=data,
        task=TrainTask(
            name=plan.name,
            config=plan.config,
            train=train,
            validation=validation,
            label_ids=[encode_label(label, tokenizer) for label in data.labels],
        ),
        held_out_part=held_out_part,
        held_out=held_out,
        held_out_encoded=encoded,
        notes=(*loaded.notes, *_notes(plan, data, (*train, *validation, *test))),
    )


def _notes(plan: TaskPlan, data: TaskData, encoded: Sequence[EncodedExample]) -> list[str]:
    """What makes figures say less, what was asked for and is of no effect, and what was cut."""
    notes = []
    if data.validation and not data.test:
        notes.append("no test examples: figures are of the validation examples, by which the kept prompt is chosen")
    if plan.template != PLAIN_TEMPLATE and not data.labels:
        notes.append('the template is not used: it is for {"text", "label"} lines, of which there are none')
    num_truncated = sum(example.is_truncated for example in encoded)
    if num_truncated:
        notes.append(f"{num_truncated} of {len(encoded)} examples were too long; their prompts lost the beginning")
    return notes


def _encode_parts(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None, truncates: bool
) -> list[tuple[EncodedExample, ...]]:
    """Training, validation and test examples' tokens. Raises DataError with what is wrong in any of them."""
    parts = (data.train, data.validation, data.test)
    encoded = encode_examples([*itertools.chain(*parts)], tokenizer, max_tokens=max_tokens, truncates=truncates)
    rest = iter(encoded)
    return [tuple(itertools.islice(rest, len(part))) for part in parts]


def check_names(plans: Sequence[TaskPlan]) -> None:
    """Raises PlanError when two plans have one name."""
    for name, count in Counter(plan.name for plan in plans).items():
        if count > 1:
            raise PlanError(f"there are {count} tasks called {name}")


def _plan_one(folder: Path, name: str, defaults: TaskPlan) -> TaskPlan:
    validation, test = folder / f"{name}{VALIDATION_SUFFIX}", folder / f"{name}{TEST_SUFFIX}"
    files = replace(
        defaults.files,
        train=folder / f"{name}{SUFFIX}",
        validation=validation if validation.is_file() else None,
        test=test if test.is_file() else None,
    )
    path = folder / f"{name}.toml"
    if not path.is_file():
        return replace(defaults, name=name, files=files)
    fields = dict(_read_toml(path))
    template = fields.pop("template", defaults.template)
    if not isinstance(template, str):
        raise PlanError(f"{path}: template: must be a text")
    try:
        shares: dict[str, Any] = {key: _as_share(fields.pop(key), key) for key in _SPLIT_KEYS if key in fields}
        config = make_train_config(_merged(defaults.config, fields))
        return TaskPlan(name=name, files=replace(files, **shares), config=config, template=template)
    except (ConfigError, ValueError) as error:
        raise PlanError(f"{path}: {error}") from None


def _merged(defaults: TrainConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that were given, with what a file says of its own. Another method has its own usual values."""
    given = defaults.model_dump(exclude_unset=True)
    if fields.get("method", defaults.method) != defaults.method:
        for name in ("init", "init_text", "encoder_hidden_size", "learning_rate"):
            given.pop(name, None)
    return given | dict(fields)


def _as_share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: must be a number")
    return float(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TOML_BYTES + 1)
        if len(text) > _MAX_TOML_BYTES:
            raise PlanError(f"{path} is longer than {_MAX_TOML_BYTES} bytes")
        return tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not valid TOML: {error}") from None
