"""What the store says of training: files, jobs and their events, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UNFINISHED: frozenset[JobStatus] = frozenset({"queued", "running"})

EventLevel = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFile:
    """Examples that a tenant uploaded. `digest` is the SHA-256 (hex) of the bytes, `num_bytes` their number."""

    id: str
    tenant: str
    filename: str
    digest: str
    num_bytes: int
    num_examples: int
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A prompt that is to be made for `task`, from a file of examples.

    `spec` is what was asked for and `result` what came of it; the store keeps both and looks into neither. `error` has
    `code`, `message` and `param`. `data_digest` is that of the training file.
    `num_starts` are the times that a server took it in hand and did not give it back: the last may go on yet.
    """

    id: str
    tenant: str
    task: str
    status: JobStatus
    training_file: str
    validation_file: str | None
    data_digest: str
    spec: Mapping[str, Any] = field(hash=False)
    result: Mapping[str, Any] | None = field(hash=False, default=None)
    error: Mapping[str, Any] | None = field(hash=False, default=None)
    created_at: datetime
    created_by: str
    finished_at: datetime | None = None
    num_starts: int = 0

    @property
    def is_unfinished(self) -> bool:
        return self.status in UNFINISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEvent:
    """One thing that a job had to tell. `serial` grows with time; None until it is stored."""

    level: EventLevel
    type: EventType
    message: str
    at: datetime
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)
    serial: int | None = None
