"""The cells that train prompts: many tasks, beginnings and seeds in the same passes, by promptmux's trainer.

Owns where an unfinished group is kept: one that was interrupted is gone on from by the next run, with the same members.
Refuses to know how answers are scored.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.peak_memory import PeakMemory
from benchmarks.tuning.cells import Cell
from benchmarks.tuning.ledger import Group, Training
from benchmarks.tuning.options import DeadlineReached, Options
from tuning.config import RunConfig, TrainConfig
from tuning.encoding import encode_examples, encode_label
from tuning.examples import TaskData
from tuning.records import TrainedPrompt, TrainEvent, TrainTask
from tuning.trainer import Trainer

MEMBERS_FILE = "members.json"
PROGRESS_S = 15.0

Members = Mapping[str, Cell]
"""Cells by fingerprint, in the order in which they are trained."""


@dataclass(frozen=True, slots=True)
class TrainedCell:
    """A finished prompt's folder, and what making it took."""

    folder: Path
    training: Training
    group: Group


def unfinished_groups(runs_folder: Path, planned: Members, done: Collection[str]) -> Iterator[Members]:
    """Groups that were begun and have members that are not `done`. Those whose members are all done are removed; those
    with members that are not `planned` now are left for another run.
    """
    for folder in sorted(runs_folder.iterdir()) if runs_folder.is_dir() else []:
        file = folder / MEMBERS_FILE
        fingerprints = json.loads(file.read_text()) if file.exists() else []
        if all(fingerprint in done for fingerprint in fingerprints):
            shutil.rmtree(folder)
        elif all(fingerprint in planned for fingerprint in fingerprints):
            yield {fingerprint: planned[fingerprint] for fingerprint in fingerprints}


def train_prompts(
    members: Members,
    options: Options,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, TaskData],
    instructions: Mapping[str, str],
) -> dict[str, TrainedCell]:
    """Train a group; the cells that came out of it, by fingerprint. Raises DeadlineReached.

    What a group leaves in `runs_folder` is needed until its cells are in the ledger; see `forget_group`.
    """
    folder = group_folder(options.runs_folder, list(members))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MEMBERS_FILE, json.dumps(list(members)))
    tasks = [
        _train_task(cell, options, tokenizer, data[cell.task], instructions[cell.task]) for cell in members.values()
    ]
    run = RunConfig(
        max_tokens_per_pass=options.max_tokens_per_pass,
        activation_checkpointing=options.activation_checkpointing,
        max_tasks_at_once=max(len(tasks), 1),
        checkpoint_every=options.checkpoint_every,
    )
    peak = PeakMemory()
    trainer = Trainer(
        model,
        tokenizer,
        tasks,
        run=run,
        folder=folder,
        listener=_Progress(len(tasks)),
        base_model_name=Path(options.backbone).name,
    )
    try:
        while trainer.step():
            options.check_deadline()
    except DeadlineReached:
        trainer.save()
        raise
    group = Group(
        keys=tuple(cell.key for cell in members.values()),
        seconds=round(max((result.seconds for result in trainer.results.values()), default=0.0), 2),
        peak_memory_mb=peak.mb,
    )
    return {
        fingerprint: TrainedCell(
            _keep(trainer.results[cell.slug], options.prompts_folder / f"{cell.slug}-{fingerprint[:8]}"),
            _describe(trainer.results[cell.slug], task.config, len(members)),
            group,
        )
        for (fingerprint, cell), task in zip(members.items(), tasks, strict=True)
        if cell.slug in trainer.results
    }


def forget_group(members: Members, options: Options) -> None:
    """Remove what training left, once its cells are in the ledger."""
    shutil.rmtree(group_folder(options.runs_folder, list(members)), ignore_errors=True)


def group_folder(runs_folder: Path, fingerprints: Sequence[str]) -> Path:
    return runs_folder / hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]


def write_whole(path: Path, text: str) -> None:
    """The file is there with all of its text, or as it was."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _train_task(
    cell: Cell, options: Options, tokenizer: PreTrainedTokenizerBase, data: TaskData, instruction: str
) -> TrainTask:
    recipe = options.recipe
    config = TrainConfig.model_validate(
        {
            "method": cell.method,
            "num_virtual_tokens": cell.k,
            "init": cell.init,
            "init_text": instruction if cell.init == "text" else None,
            "num_steps": recipe.num_steps,
            "batch_size": recipe.batch_size,
            "num_warmup_steps": recipe.num_warmup_steps,
            "eval_every": recipe.eval_every,
            "seed": cell.seed,
        }
    )
    return TrainTask(
        name=cell.slug,
        config=config,
        train=encode_examples(data.train, tokenizer),
        validation=encode_examples(data.validation, tokenizer),
        label_ids=[encode_label(label, tokenizer) for label in data.labels],
    )


def _keep(result: TrainedPrompt, folder: Path) -> Path:
    """Copy PEFT's two files to where they stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(result.folder / name, folder / name)
    return folder


def _describe(result: TrainedPrompt, config: TrainConfig, num_members: int) -> Training:
    return Training(
        num_parameters=result.num_parameters,
        num_steps=result.num_steps,
        num_examples=result.num_examples,
        # All members run from the first step to the last, side by side.
        seconds=round(result.seconds / num_members, 2),
        learning_rate=config.usual_learning_rate,
        best_step=result.best_step,
        best_loss=result.best_loss,
    )


class _Progress:
    """A line on stderr now and then."""

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._last_s = time.monotonic()
        self._num_examples = 0

    def __call__(self, event: TrainEvent) -> None:
        if event.kind == "failed":
            print(f"{event.task} failed at step {event.step}: {event.message}", file=sys.stderr, flush=True)
        if event.kind != "step":
            return
        self._num_examples += event.num_examples
        passed_s = time.monotonic() - self._last_s
        if passed_s >= PROGRESS_S:
            print(
                f"  step {event.step}/{event.num_steps} of {self._num_tasks} prompts together, "
                f"{self._num_examples / passed_s:.1f} examples/s, loss {event.loss:.3f} ({event.task})",
                file=sys.stderr,
                flush=True,
            )
            self._last_s, self._num_examples = time.monotonic(), 0
