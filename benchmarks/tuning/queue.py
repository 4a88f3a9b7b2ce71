"""The queue: which cells are still to be made, and the making of them one after the other, until a deadline.

Owns resuming: what is in the ledger under the same fingerprint is not made again, and each cell is in the ledger before
the next begins. Refuses to know how cells are made.
"""

import datetime
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import describe_machine
from benchmarks.training_peers import load_model
from benchmarks.tuning.cells import LATENCY, NO_PROMPT, PROMPTS, TEXTS, Cell, fingerprint
from benchmarks.tuning.latency import LatencyRun, measure_in_child
from benchmarks.tuning.ledger import Ledger, Record, read_ledger
from benchmarks.tuning.options import DeadlineReached, Options
from benchmarks.tuning.prompts import Members, forget_group, train_prompts, unfinished_groups
from benchmarks.tuning.scoring import describe, score
from benchmarks.tuning.tasks import read_task, spec_of, write_tasks
from benchmarks.tuning.texts import in_form
from benchmarks.tuning.weights import train_weights
from server.embedded import default_cache_dir
from server.engine.fingerprint import fingerprint_folder
from tuning.encoding import encode_examples
from tuning.examples import Example
from tuning.prefixes import load_prefix


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: cells that it made, and planned ones that are still to be made."""

    num_made: int
    num_left: int


def run_queue(cells: Sequence[Cell], options: Options) -> Outcome:
    """Make the cells that are not in the ledger, in order. Raises LedgerError, `tuning.examples.DataError`."""
    bench = _Bench(cells, options)
    num_made = 0
    with Ledger(options.ledger) as ledger:
        done = {record.fingerprint for record in read_ledger(options.ledger)}
        num_pending = sum(print_ not in done for print_ in bench.planned)
        _say(f"{num_pending} of {len(bench.planned)} cells are to be made")
        try:
            for members in _groups(bench.planned, done, options):
                options.check_deadline()
                for record in bench.make(members, done):
                    ledger.append(record)
                    num_made += 1
                    _say(f"[{num_made}/{num_pending}] {record.key}: {_summary(record)}")
                forget_group(members, options)
        except DeadlineReached:
            _say("the deadline is reached; what is under way goes on at the next run")
    return Outcome(num_made, num_pending - num_made)


def _groups(planned: Members, done: Collection[str], options: Options) -> Iterator[Members]:
    """Unfinished groups first; then neighbours that are made together: prompts of one method, and all latencies."""
    left = {print_: cell for print_, cell in planned.items() if print_ not in done}
    for members in unfinished_groups(options.runs_folder, planned, done):
        yield members
        left = {print_: cell for print_, cell in left.items() if print_ not in members}
    for method, neighbours in itertools.groupby(left.items(), key=lambda item: item[1].method):
        size = options.together if method in PROMPTS else len(left) if method == LATENCY else 1
        for chunk in _chunks(list(neighbours), size):
            yield dict(chunk)


def _chunks(items: Sequence[tuple[str, Cell]], size: int) -> Iterator[Sequence[tuple[str, Cell]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class _Bench:
    """What cells are made with: the backbone, the data, and the planned cells by fingerprint."""

    def __init__(self, cells: Sequence[Cell], options: Options) -> None:
        self._options = options
        self._machine = describe_machine()
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(options.backbone)
        if self._tokenizer.chat_template is None:
            _say("the backbone has no chat template: what is written as a chat is left out")
            cells = [cell for cell in cells if not _is_chat(cell)]
        tasks = list(dict.fromkeys(cell.task for cell in cells))
        write_tasks(options.data_folder, tasks)
        self._data = {task: read_task(options.data_folder, task, self._tokenizer) for task in tasks}
        self._backbone_digest = fingerprint_folder(Path(options.backbone), default_cache_dir())
        self.planned = {self._fingerprint(cell): cell for cell in cells}

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(self._options.backbone, self._options.dtype, frozen=True)

    def make(self, members: Members, done: Collection[str]) -> Iterator[Record]:
        """The records of the members that are not done. Raises DeadlineReached."""
        (method,) = {cell.method for cell in members.values()}
        if method in TEXTS:
            yield from self._score_texts(members)
        elif method in PROMPTS:
            yield from self._train_prompts(members, done)
        elif method == LATENCY:
            yield from self._measure_latency(members)
        else:
            yield from self._train_weights(members)

    def _score_texts(self, members: Members) -> Iterator[Record]:
        for print_, cell in members.items():
            labels = self._data[cell.task].labels
            scores = score(self._model, self._tokenizer, self._in_form(cell, cell.method), labels)
            yield self._record(print_, cell, scores=scores)

    def _train_prompts(self, members: Members, done: Collection[str]) -> Iterator[Record]:
        trained = train_prompts(
            members,
            self._options,
            model=self._model,
            tokenizer=self._tokenizer,
            data=self._data,
            instructions={task: spec_of(task).instruction for task in self._data},
        )
        for print_, made in trained.items():
            if print_ not in done:
                cell, name = members[print_], Path(self._options.backbone).name
                prefix = load_prefix(made.folder, self._model, base_model_name=name)
                data = self._data[cell.task]
                scores = score(self._model, self._tokenizer, data.test, data.labels, prefix=prefix)
                yield self._record(print_, cell, scores=scores, training=made.training, group=made.group)

    def _train_weights(self, members: Members) -> Iterator[Record]:
        for print_, cell in members.items():
            data = self._data[cell.task]
            made = train_weights(
                cell,
                self._options.recipe,
                folder=self._options.backbone,
                dtype=self._options.dtype,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                train=encode_examples(data.train, self._tokenizer),
                validation=encode_examples(data.validation, self._tokenizer),
                check_deadline=self._options.check_deadline,
            )
            scores = score(made.model, self._tokenizer, data.test, data.labels)
            yield self._record(print_, cell, scores=scores, training=made.training, group=made.group)

    def _measure_latency(self, members: Members) -> Iterator[Record]:
        recipe = self._options.recipe
        runs = {}
        for print_, cell in members.items():
            form = NO_PROMPT if cell.k is not None else str(cell.form)
            encoded = encode_examples(self._in_form(cell, form), self._tokenizer)
            runs[print_] = LatencyRun(
                key=print_,
                texts=[example.prompt_ids for example in encoded],
                k=cell.k,
                num_items=recipe.num_latency_items,
                num_new_tokens=recipe.num_latency_tokens,
            )
        measured = measure_in_child(
            list(runs.values()),
            folder=self._options.backbone,
            dtype=self._options.dtype_name,
            num_threads=self._options.num_threads,
        )
        for print_, latency in measured:
            yield self._record(print_, members[print_], latency=latency)

    def _in_form(self, cell: Cell, form: str) -> list[Example]:
        return in_form(
            form,
            spec_of(cell.task),
            self._data[cell.task],
            tokenizer=self._tokenizer,
            num_shots=self._options.recipe.num_shots,
            seed=cell.seed,
        )

    def _fingerprint(self, cell: Cell) -> str:
        return fingerprint(
            cell,
            self._options.recipe,
            data_digest=self._data[cell.task].digest,
            backbone_digest=self._backbone_digest,
            dtype=self._options.dtype_name,
        )

    def _record(self, print_: str, cell: Cell, **parts: Any) -> Record:
        return Record(
            key=cell.key,
            fingerprint=print_,
            cell=cell,
            settings=self._options.recipe.settings(cell),
            data=describe(self._data[cell.task]),
            backbone=Path(self._options.backbone).name,
            dtype=self._options.dtype_name,
            machine=self._machine,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            **parts,
        )


def labels_of(tasks: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The labels of each classification task."""
    return {task: labels for task in tasks if (labels := spec_of(task).labels)}


def _is_chat(cell: Cell) -> bool:
    return (cell.form or cell.method).endswith("-chat")


def _summary(record: Record) -> str:
    if record.latency is not None:
        return f"{record.latency.first_token_ms:.1f} ms to the first token"
    if record.scores is None:
        return "no figures"
    took = f", {record.training.seconds:.0f} s" if record.training is not None else ""
    return f"exact match {record.scores.exact_match:.3f}{took}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
