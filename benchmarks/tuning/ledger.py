"""Finished cells: what is known of each, and the file of JSON lines that they are appended to for good.

Owns durability: a line is on disk before `append` returns, a line that was cut off by a kill is dropped at the next
start, and two runs never write to one file at once. Refuses to know how figures come about.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.tuning.cells import Cell


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataFacts(_Part):
    """The data that a cell was made of. `majority_share` is the exact match of always giving the commonest answer."""

    digest: str
    num_train: int
    num_validation: int
    num_test: int
    num_labels: int
    majority_share: float


class Scores(_Part):
    """On the test items. `label_accuracy` is by likelihood, for classification; `loss` in nats a completion token."""

    exact_match: float
    label_accuracy: float | None
    loss: float


class Training(_Part):
    """What training took. `seconds` are this cell's share of its group's; `learning_rate` is the highest."""

    num_parameters: int
    num_steps: int
    num_examples: int
    seconds: float
    learning_rate: float
    best_step: int
    best_loss: float


class Group(_Part):
    """What was trained in the same passes. `seconds` and `peak_memory_mb` are the whole group's."""

    keys: tuple[str, ...]
    seconds: float
    peak_memory_mb: float


class Latency(_Part):
    """Of one request at a time, medians. `num_text_tokens`: of the item and the text before it, cached or not."""

    first_token_ms: float
    whole_ms: float
    num_text_tokens: int
    num_cached_tokens: int
    num_new_tokens: int


class Record(_Part):
    """A finished cell."""

    key: str
    fingerprint: str
    cell: Cell
    settings: dict[str, Any]
    data: DataFacts
    backbone: str
    dtype: str
    scores: Scores | None = None
    training: Training | None = None
    group: Group | None = None
    latency: Latency | None = None
    machine: dict[str, Any]
    date: str


class LedgerError(RuntimeError):
    """The file cannot be used; the message names it and the line."""


class Ledger:
    """The file of finished cells, open for appending. Use as a context manager: it is locked meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(f"{self._path}: another run is writing to it") from None
        try:
            _drop_torn_line(self._path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def append(self, record: Record) -> None:
        """Write one line, which is on disk when this returns."""
        with self._path.open("ab") as file:
            file.write(record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_ledger(path: Path) -> list[Record]:
    """Finished cells in the order of the file; none where it does not exist.

    A last line without an end was cut off, and is passed over. Raises LedgerError for any other line that is no record.
    """
    if not path.exists():
        return []
    records = []
    *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise LedgerError(f"{path}:{number}: {where}: {first['msg']}") from None
    return records


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            os.fsync(file.fileno())
