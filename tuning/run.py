"""From prepared tasks to finished folders: train all, measure each on its held-out examples, write what is known.

A finished prompt is `OUT/NAME/`: PEFT's two files, `training.json`, `metrics.jsonl`, `held_out.jsonl`, and
`curves.png` where plots are wanted. It appears whole or not at all. What a killed run goes on from is in
`OUT/.training/`, which goes when all is done. Refuses to know terminals, servers and how a step is taken.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prompt_store.errors import StoreInUse
from prompt_store.locks import FolderLock, is_held
from tuning.config import RunConfig
from tuning.evaluation import Evaluation, evaluate
from tuning.limits import context_length
from tuning.methods.base import sync
from tuning.plans import PreparedTask
from tuning.prefixes import CONFIG_FILE, PROMPT_FILE, Prefix, PrefixError, load_prefix
from tuning.provenance import HELD_OUT_FILE, RECORD_FILE, Measured, make_record, same_training, write_held_out
from tuning.records import TrainedPrompt, TrainEvent, TuningError
from tuning.reports import CURVES_FILE, METRICS_FILE, plot_curves, require_matplotlib, write_metrics
from tuning.run_state import STATE_FILE, load_state
from tuning.trainer import Trainer

STATE_FOLDER: Final = ".training"
_LOCK_FILE: Final = ".lock"


class RunError(TuningError):
    """A run cannot begin where it was told to write; the message says what is there and what to do."""


@dataclass(frozen=True, slots=True)
class TrainingBackbone:
    """A frozen model in eval mode, its tokenizer, and the name that prompts give of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def facts(self) -> dict[str, Any]:
        """What a prompt's record says of the backbone it was trained over."""
        return {
            "name": self.name,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTask:
    """A task's folder and its record (`tuning.provenance`); of a task that failed, the reason alone."""

    name: str
    folder: Path | None
    record: Mapping[str, Any] | None
    failure: str | None = None


def run_tasks(
    backbone: TrainingBackbone,
    tasks: Sequence[PreparedTask],
    *,
    run: RunConfig,
    out: Path,
    resumes: bool = False,
    plots: bool = False,
    cautions: Mapping[str, Sequence[str]] | None = None,
    listener: Callable[[TrainEvent], None] | None = None,
    on_measuring: Callable[[str, int, int], None] | None = None,
) -> list[FinishedTask]:
    """Train, measure and write all tasks; in their order. One that fails leaves the others alone.

    `resumes` goes on with what an earlier call with the same tasks left in `out`; what is finished there is not trained
    again. `cautions` are warnings by task that go into its record. `on_measuring` is told of a task, how many answers
    are made and of how many.

    Raises RunError, what the trainer raises, and PlotsUnavailableError before anything is done.
    """
    if plots:
        require_matplotlib()
    state = out / STATE_FOLDER
    done = _find_done(out, tasks, backbone.facts(), resumes=resumes)
    to_train = [prepared for prepared in tasks if prepared.plan.name not in done]
    failures: dict[str, str] = {}
    with _holding(state):
        results: dict[str, TrainedPrompt] = {}
        if to_train:
            trainer = Trainer(
                backbone.model,
                backbone.tokenizer,
                [prepared.task for prepared in to_train],
                run=run,
                folder=state,
                listener=listener,
                base_model_name=backbone.name,
            )
            results = trainer.run()
            failures = {name: failure.reason for name, failure in trainer.failures.items()}
        for prepared in to_train:
            name = prepared.plan.name
            if name in results:
                try:
                    done[name] = _finish(
                        backbone,
                        prepared,
                        results[name],
                        out=out,
                        plots=plots,
                        cautions=(cautions or {}).get(name, ()),
                        on_measuring=on_measuring,
                    )
                except PrefixError as error:
                    # As a server would refuse it.
                    failures[name] = f"the prompt that was trained cannot be served: {error}"
        shutil.rmtree(state, ignore_errors=True)
    names = [prepared.plan.name for prepared in tasks]
    return [
        FinishedTask(name=name, folder=out / name, record=done[name])
        if name in done
        else FinishedTask(name=name, folder=None, record=None, failure=failures[name])
        for name in names
    ]


@contextmanager
def _holding(state: Path) -> Iterator[None]:
    """The folder of the run's state, for this process alone. Where nothing was trained yet, it goes with an error."""
    state.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(state / _LOCK_FILE)
    except StoreInUse:
        raise _taken(state) from None
    try:
        yield
    except TuningError:
        if not (state / STATE_FILE).exists():
            shutil.rmtree(state, ignore_errors=True)
        raise
    finally:
        lock.release()


def _taken(state: Path) -> RunError:
    return RunError(f"another process trains into {state.parent}; wait for it, or write elsewhere (--out)")


def _find_done(
    out: Path, tasks: Sequence[PreparedTask], facts: Mapping[str, Any], *, resumes: bool
) -> dict[str, dict[str, Any]]:
    """Records of what an earlier call has finished. Raises RunError where `out` is not as `resumes` says."""
    state = out / STATE_FOLDER
    if state.exists() and is_held(state / _LOCK_FILE):
        raise _taken(state)
    if state.exists() and not resumes:
        raise RunError(f"{out} holds a run that was not finished; go on with it (--resume), or remove {state}")
    names = {prepared.plan.name for prepared in tasks}
    others = sorted(load_state(state).keys() - names)
    if others:
        # Their state would be lost with this run's end.
        raise RunError(
            f"{out} holds an unfinished run of {', '.join(others)} too; give all its tasks, or write elsewhere (--out)"
        )
    done = {}
    for prepared in tasks:
        folder = out / prepared.plan.name
        if not folder.exists():
            continue
        if not resumes:
            raise RunError(f"{folder} exists; remove it, or write elsewhere (--out)")
        record = _read_record(folder)
        if record is None or not same_training(record, prepared, facts):
            raise RunError(
                f"{folder} holds something else than this run's prompt; remove it, or write elsewhere (--out)"
            )
        done[prepared.plan.name] = record
    return done


def _finish(
    backbone: TrainingBackbone,
    prepared: PreparedTask,
    trained: TrainedPrompt,
    *,
    out: Path,
    plots: bool,
    cautions: Sequence[str],
    on_measuring: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    """Measure one prompt and write its folder."""
    name = prepared.plan.name
    # There, so that it goes with the run's state when a killed run is gone on from.
    made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out / STATE_FOLDER))
    try:
        made.chmod(0o755)
        digest = _copy_prompt(trained.folder, made)
        # Read back, so that what is measured is what a server will load.
        prefix = load_prefix(made, backbone.model, base_model_name=backbone.name)
        measured = _measure(backbone, prepared, prefix, on_measuring) if prepared.held_out else None
        record = make_record(
            prepared,
            trained,
            measured,
            backbone=backbone.facts(),
            warnings=_distinct([*cautions, *prefix.warnings]),
            file_digest=digest,
        )
        write_metrics(made / METRICS_FILE, trained.history, _evaluations(prepared, measured))
        write_held_out(made / HELD_OUT_FILE, prepared.held_out, prepared.held_out_encoded, backbone.tokenizer)
        if plots:
            best = trained.best_step if prepared.data.validation else None
            plot_curves(made / CURVES_FILE, name, trained.history, best_step=best)
        (made / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (*made.iterdir(), made):
            sync(path)
        made.rename(out / name)
        sync(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return record


def _copy_prompt(source: Path, folder: Path) -> str:
    """PEFT's two files; the digest by which a server will know the prompt."""
    for name in (PROMPT_FILE, CONFIG_FILE):
        shutil.copyfile(source / name, folder / name)
    return hashlib.sha256((folder / PROMPT_FILE).read_bytes()).hexdigest()


def _measure(
    backbone: TrainingBackbone,
    prepared: PreparedTask,
    prefix: Prefix,
    on_measuring: Callable[[str, int, int], None] | None,
) -> Measured:
    num_examples = len(prepared.held_out)

    def measure(prefix: Prefix | None, num_before: int) -> Evaluation:
        def progress(num_done: int) -> None:
            if on_measuring is not None:
                on_measuring(prepared.plan.name, num_before + num_done, 2 * num_examples)

        return evaluate(
            backbone.model,
            backbone.tokenizer,
            prefix,
            prepared.held_out,
            prepared.held_out_encoded,
            labels=prepared.data.labels,
            max_positions=context_length(backbone.model),
            progress=progress,
        )

    return Measured(measure(prefix, 0), measure(None, num_examples))


def _evaluations(prepared: PreparedTask, measured: Measured | None) -> dict[str, dict[str, Any]]:
    if measured is None:
        return {}
    of = {"examples": prepared.held_out_part}
    return {"prompt": of | measured.prompt.figures(), "without_prompt": of | measured.without_prompt.figures()}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """None for a folder without one that can be read."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _distinct(warnings: Sequence[str]) -> list[str]:
    """The first of each code."""
    first: dict[str, str] = {}
    for warning in warnings:
        first.setdefault(warning.partition(":")[0], warning)
    return list(first.values())
