"""What the `/v1/tasks` routes take and answer."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from prompt_store.manifest import Canary, CanaryChange, Gate, GateStatus, Provenance
from server.runtime.gates import FAILURES
from server.runtime.ownership import may_change
from server.runtime.stats import Latency, TaskStats
from server.runtime.tasks import TaskView, VersionView
from server.tenancy.keys import Caller

Residency = Literal["device", "host", "store"]
MAX_PAGE = 1000
MAX_VERSION = 999_999_999


class TaskPage(BaseModel):
    """The query of the list of tasks."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=MAX_PAGE)
    after: str | None = Field(None, max_length=100, description="The last name of the page before.")


class VersionPage(BaseModel):
    """The query of a task's history."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=MAX_PAGE)
    after: int | None = Field(None, ge=1, le=MAX_VERSION, description="The last version of the page before.")


class CanaryObject(BaseModel):
    """A version that answers a share of the requests that name the task alone; which, their ids decide."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=MAX_VERSION)
    percent: int = Field(ge=1, le=99)


class TaskUpdate(BaseModel):
    """All that is given changes at once, or nothing does."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"active_version": 3, "expected_version": 4}]}
    )

    active_version: int | None = Field(None, ge=1, le=MAX_VERSION, description="Roll out, or roll back.")
    expected_version: int | None = Field(
        None, ge=0, le=MAX_VERSION, description="Refuse (409) unless this version is active now."
    )
    pinned: bool | None = Field(None, description="Keep its prefix on the device.")
    canary: CanaryObject | None = Field(
        None, description="Send a share of the requests to another version; null ends that, left out changes nothing."
    )

    @property
    def canary_change(self) -> CanaryChange:
        if "canary" not in self.model_fields_set:
            return "keep"
        return None if self.canary is None else Canary(self.canary.version, self.canary.percent)


class TaskObject(BaseModel):
    object: Literal["task"] = "task"
    task: str
    tenant: str = Field(description="The owner: the caller's tenant, or `shared`.")
    active_version: int | None
    pinned: bool
    canary: CanaryObject | None
    residency: Residency = Field(description="Where the active version's prefix is.")
    num_versions: int
    created: int

    @classmethod
    def of(cls, view: TaskView) -> Self:
        task = view.task
        return cls(
            task=task.task,
            tenant=task.tenant,
            active_version=task.active_version,
            pinned=task.pinned,
            canary=(
                None if task.canary is None else CanaryObject(version=task.canary.version, percent=task.canary.percent)
            ),
            residency=view.residency,
            num_versions=task.num_versions,
            created=int(task.created_at.timestamp()),
        )


class TaskList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TaskObject]
    has_more: bool


class ProvenanceObject(BaseModel):
    """Where a version comes from; null is what the uploader did not say."""

    training_run: str | None
    data_digest: str | None
    key_id: str | None
    key_label: str | None
    uploaded_at: int
    backbone_name: str | None
    backbone_fingerprint: str

    @classmethod
    def of(cls, provenance: Provenance) -> Self:
        return cls(
            training_run=provenance.training_run,
            data_digest=provenance.data_digest,
            key_id=provenance.key_id,
            key_label=provenance.key_label,
            uploaded_at=int(provenance.uploaded_at.timestamp()),
            backbone_name=provenance.backbone_name,
            backbone_fingerprint=provenance.backbone_fingerprint,
        )


class GateObject(BaseModel):
    """The condition for becoming active, and how far its check has come. Passed, but not activated because another
    version was meanwhile, is `conflict`.
    """

    threshold: float
    status: GateStatus
    score: float | None
    num_probes: int
    activates: bool
    finished_at: int | None
    detail: dict[str, Any] = Field(
        description="`failures`, which holds texts of probes, is there for keys alone that may change the version."
    )

    @classmethod
    def of(cls, gate: Gate, *, shows_probes: bool) -> Self:
        return cls(
            threshold=gate.threshold,
            status=gate.status,
            score=gate.score,
            num_probes=gate.num_probes,
            activates=gate.activates,
            finished_at=None if gate.finished_at is None else int(gate.finished_at.timestamp()),
            detail={name: value for name, value in gate.detail.items() if shows_probes or name != FAILURES},
        )


class VersionObject(BaseModel):
    object: Literal["prompt_version"] = "prompt_version"
    task: str
    version: int
    digest: str = Field(description="SHA-256 of the uploaded file.")
    peft_type: str
    task_index: int | None
    num_virtual_tokens: int
    bytes: int
    created: int
    created_by: str
    backbone: str = Field(description="Fingerprint of the backbone that it was checked against.")
    state: Literal["active", "inactive", "quarantined"]
    residency: Residency
    metadata: dict[str, Any]
    provenance: ProvenanceObject
    gate: GateObject | None
    warnings: list[str] = Field(description="Each begins with a stable code and a colon.")

    @classmethod
    def of(cls, view: VersionView, caller: Caller) -> Self:
        """As `caller` may see it."""
        version = view.version
        is_own = may_change(caller, version)
        return cls(
            task=version.task,
            version=version.version,
            digest=version.digest,
            peft_type=version.peft_type,
            task_index=version.task_index,
            num_virtual_tokens=version.num_virtual_tokens,
            bytes=version.num_bytes,
            created=int(version.created_at.timestamp()),
            created_by=version.created_by,
            backbone=version.backbone,
            state=version.state,
            residency=view.residency,
            metadata=dict(version.metadata),
            provenance=ProvenanceObject.of(version.provenance),
            gate=None if version.gate is None else GateObject.of(version.gate, shows_probes=is_own),
            warnings=list(version.warnings),
        )


class VersionList(BaseModel):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[VersionObject]
    has_more: bool


class Deleted(BaseModel):
    object: Literal["task", "prompt_version"]
    task: str
    version: int | None = None
    deleted: Literal[True] = True


class LatencyObject(BaseModel):
    """Seconds; null before the first observation."""

    p50: float | None
    p90: float | None
    p99: float | None
    num_samples: int

    @classmethod
    def of(cls, latency: Latency) -> Self:
        return cls(p50=latency.p50, p90=latency.p90, p99=latency.p99, num_samples=latency.num_samples)


class TaskStatsObject(BaseModel):
    """What the caller's tenant has used of a task since the server started."""

    object: Literal["task_stats"] = "task_stats"
    task: str
    since: int
    requests: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    finish_reasons: dict[str, int]
    time_to_first_token_seconds: LatencyObject
    e2e_request_latency_seconds: LatencyObject

    @classmethod
    def of(cls, task: str, stats: TaskStats) -> Self:
        return cls(
            task=task,
            since=int(stats.since),
            requests=stats.requests,
            rows=stats.rows,
            prompt_tokens=stats.prompt_tokens,
            completion_tokens=stats.completion_tokens,
            finish_reasons=stats.finish_reasons,
            time_to_first_token_seconds=LatencyObject.of(stats.ttft),
            e2e_request_latency_seconds=LatencyObject.of(stats.e2e),
        )
