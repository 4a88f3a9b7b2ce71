"""Tasks and their prompt versions as a caller sees them.

Owns which tenant a name is looked up in (the caller's own, then `shared`; writing to `shared` needs the scope `admin`),
and what a change in the store means for the engine: what is deleted is evicted, what is pinned stays resident. Refuses
to know HTTP. Every method may block on the disk: call them in a thread. All raise the errors of `server.errors`.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_store import errors as store_errors
from prompt_store.gates import UNFINISHED
from prompt_store.manifest import (
    AuditEntry,
    CanaryChange,
    GateStatus,
    PromptVersion,
    Quota,
    Receipt,
    SoftPrompt,
    Task,
)
from prompt_store.probes import Probe
from prompt_store.store import PromptStore
from server.engine.request import PromptRef
from server.errors import PromptCorruptError
from server.metrics import Metrics
from server.runtime.protocols import EngineLike, Residency
from server.runtime.stats import TaskStats, TaskStatsTable
from server.runtime.store_errors import client_errors
from server.tenancy.keys import Caller

_PAGE = 1000
# Whom the audit log names for what the server does by itself.
SERVER_ACTOR = "promptmux"


@dataclass(frozen=True, slots=True)
class TaskView:
    task: Task
    active: PromptVersion | None
    residency: Residency


@dataclass(frozen=True, slots=True)
class VersionView:
    version: PromptVersion
    residency: Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptUpload:
    """One upload as it came: the two files' bytes and what is to be done with them."""

    task: str
    file: bytes
    config: bytes
    activate: bool = True
    expected_version: int | None = None
    metadata: Mapping[str, Any] | None = None
    task_index: int | None = None
    training_run: str | None = None
    data_digest: str | None = None
    probes: bytes | None = None
    gate_threshold: float | None = None


def resident_key(version: PromptVersion) -> str:
    """What the engine files the version's prefix under. It holds the tenant: were two tenants' equal files one prefix,
    the time to a first token would tell one of them what the other has uploaded.
    """
    return f"{version.tenant}/{version.prefix_key}"


def to_ref(version: PromptVersion) -> PromptRef:
    """What a row holds of a version."""
    return PromptRef(
        tenant=version.tenant,
        task=version.task,
        version=version.version,
        digest=version.digest,
        prefix_key=resident_key(version),
        kind=version.kind,
        num_virtual_tokens=version.num_virtual_tokens,
    )


def load_prompt(store: PromptStore, metrics: Metrics, ref: PromptRef) -> SoftPrompt:
    """The numbers of the version that `ref` names, its digest checked. The engine's loader thread calls this."""
    with client_errors():
        version = store.get_version(ref.tenant, ref.task, ref.version)
        if version.digest != ref.digest:
            raise PromptCorruptError(f"Version {ref.version} of task {ref.task!r} no longer has its digest.")
        try:
            return store.load(version)
        except store_errors.PromptCorrupt:
            if version.state != "quarantined":
                metrics.prompt_digest_mismatch_total.inc()
            raise


class TaskService:
    """The store and the engine's residency, seen by one caller at a time. Thread-safe.

    `quota_of` gives the limits that a tenant's uploads are held to; left out, they are the tenant's own in the store.
    """

    def __init__(
        self,
        store: PromptStore,
        engine: EngineLike,
        stats: TaskStatsTable,
        metrics: Metrics,
        backbone_name: str,
        *,
        quota_of: Callable[[str], Quota | None] | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._stats = stats
        self._metrics = metrics
        self._backbone_name = backbone_name
        self._quota_of = quota_of if quota_of is not None else store.get_quota
        self._gate_listener: Callable[[PromptVersion], None] = lambda version: None
        self._refreshing = threading.Lock()
        self._pins: frozenset[tuple[str, str, int]] = frozenset()

    def on_pending_gate(self, listener: Callable[[PromptVersion], None]) -> None:
        """Have `listener` called, on the uploading thread, for every version that came with a gate to be checked."""
        self._gate_listener = listener

    def resolve_all(
        self, tenant: str, references: Sequence[str], request_id: str | None = None
    ) -> dict[str, PromptRef | None]:
        """What each distinct reference stands for now; None for the bare backbone.

        `request_id` decides between a task's active version and its canary; None means the active one.
        """
        return {reference: self._resolve(tenant, reference, request_id) for reference in dict.fromkeys(references)}

    def resolve_remembered(
        self, tenant: str, references: Sequence[str], request_id: str | None = None
    ) -> dict[str, PromptRef | None] | None:
        """As `resolve_all`, where the store remembers every one of them; else None. Never blocks."""
        found: dict[str, PromptRef | None] = {}
        for reference in dict.fromkeys(references):
            if reference == self._backbone_name:
                found[reference] = None
                continue
            version = self._store.resolve_remembered(tenant, reference, request_id=request_id)
            if version is None:
                return None
            found[reference] = to_ref(version)
        return found

    def find(self, tenant: str, reference: str) -> PromptVersion:
        """The version that a reference (`task`, `task@7`, `task@sha256:…`) stands for now."""
        with client_errors():
            return self._store.resolve(tenant, reference)

    def list_tasks(self, tenant: str, *, limit: int, after: str | None) -> tuple[list[TaskView], bool]:
        """Tasks that the tenant can see, its own and the shared ones, by name; whether there are more."""
        with client_errors():
            found = self._store.list_visible(tenant, limit=limit + 1, after=after)
            return [self._view(task, active) for task, active in found[:limit]], len(found) > limit

    def callable_pages(self, tenant: str) -> Iterator[list[Task]]:
        """All tasks with an active version, by name, so many at a time as are read at once."""
        after: str | None = None
        with client_errors():
            while page := self._store.list_callable(tenant, limit=_PAGE, after=after):
                yield page
                after = page[-1].task

    def get_task(self, tenant: str, task: str) -> TaskView:
        with client_errors():
            return self._view(*self._store.get_visible(tenant, task))

    def list_versions(self, tenant: str, task: str, *, limit: int, after: int | None) -> tuple[list[VersionView], bool]:
        with client_errors():
            owner = self._store.get_visible(tenant, task)[0].tenant
            versions = self._store.list_versions(owner, task, limit=limit + 1, after=after)
            return [self._view_version(version) for version in versions[:limit]], len(versions) > limit

    def get_version(self, tenant: str, task: str, version: int) -> VersionView:
        with client_errors():
            owner = self._store.get_visible(tenant, task)[0].tenant
            return self._view_version(self._store.get_version(owner, task, version))

    def read_file(self, version: PromptVersion) -> bytes:
        with client_errors():
            return self._store.read_file(version)

    def read_prompt(self, version: PromptVersion) -> SoftPrompt:
        """The numbers of a version, its digest checked."""
        return load_prompt(self._store, self._metrics, to_ref(version))

    def read_config(self, version: PromptVersion) -> bytes:
        with client_errors():
            return self._store.read_config(version)

    def read_probes(self, version: PromptVersion) -> tuple[Probe, ...]:
        """The probes that came with a version; empty if none did."""
        with client_errors():
            return self._store.read_probes(version)

    def unfinished_gates(self) -> list[PromptVersion]:
        """Versions of all tenants whose gate is pending or running, oldest first."""
        with client_errors():
            return self._store.unfinished_gates()

    def set_gate(
        self, version: PromptVersion, *, status: GateStatus, score: float | None, detail: Mapping[str, Any]
    ) -> PromptVersion:
        """How far the check of a version's gate has come, `version` being what the check began with.

        One that passes may become active by this. A gate that was set anew meanwhile is a conflict.
        """
        with client_errors():
            found = self._store.set_gate(
                version.tenant,
                version.task,
                version.version,
                status=status,
                score=score,
                detail=detail,
                measured=version,
                actor=SERVER_ACTOR,
            )
            if found.state == "active":
                self.refresh()
            return found

    def restart_gate(self, caller: Caller, task: str, version: int) -> VersionView:
        """Has the gate of a version checked again, unless that has not ended yet."""
        with client_errors():
            found = self._store.get_version(self._owner_for_write(caller, task), task, version)
            if found.gate is None or found.gate.status not in UNFINISHED:
                found = self._store.set_gate(found.tenant, task, version, status="pending", actor=caller.key_id or "")
                self._gate_listener(found)
            return self._view_version(found)

    def upload(self, caller: Caller, upload: PromptUpload) -> tuple[VersionView, bool]:
        """Stores a version in the caller's own tenant; False when it was there already."""
        with client_errors():
            version, is_new = self._store.upload(
                caller.tenant,
                upload.task,
                file=upload.file,
                config=upload.config,
                activate=upload.activate,
                expected_version=upload.expected_version,
                metadata=upload.metadata,
                task_index=upload.task_index,
                training_run=upload.training_run,
                data_digest=upload.data_digest,
                probes=upload.probes,
                gate_threshold=upload.gate_threshold,
                quota=self._quota_of(caller.tenant),
                created_by=caller.key_id or "",
            )
            self.refresh(pins_too=not is_new)
            if version.gate is not None and version.gate.status == "pending":
                self._gate_listener(version)
            return self._view_version(version), is_new

    def update_task(
        self,
        caller: Caller,
        task: str,
        *,
        active_version: int | None,
        expected_version: int | None,
        pinned: bool | None,
        canary: CanaryChange = "keep",
    ) -> TaskView:
        """Rolls out, rolls back, pins, sends a share of the requests to a canary.

        Rows that are running keep the version that they hold.
        """
        with client_errors():
            owner = self._owner_for_write(caller, task)
            updated = self._store.update_task(
                owner,
                task,
                active_version=active_version,
                expected_version=expected_version,
                pinned=pinned,
                canary=canary,
                actor=caller.key_id or "",
            )
            self.refresh()
            active = updated.active_version
            return self._view(updated, None if active is None else self._find_version(updated, active))

    def rollback(self, caller: Caller, task: str) -> TaskView:
        """Undoes the last activation; repeated, it goes further back. Rows that are running keep their version."""
        with client_errors():
            updated = self._store.rollback(self._owner_for_write(caller, task), task, actor=caller.key_id or "")
            self.refresh()
            active = updated.active_version
            return self._view(updated, None if active is None else self._find_version(updated, active))

    def delete_version(self, caller: Caller, task: str, version: int) -> None:
        with client_errors():
            owner = self._owner_for_write(caller, task)
            deleted = self._store.get_version(owner, task, version)
            self._store.delete_version(owner, task, version, actor=caller.key_id or "")
            self._evict([deleted])
            self.refresh()

    def delete_task(self, caller: Caller, task: str) -> None:
        with client_errors():
            owner = self._owner_for_write(caller, task)
            deleted = self._versions_of(owner, task)
            self._store.delete_task(owner, task, actor=caller.key_id or "")
            self._evict(deleted)
            self._stats.forget(owner, task)
            self.refresh()

    def stats(self, tenant: str, task: str) -> TaskStats:
        """What the tenant itself used of the task."""
        with client_errors():
            owner = self._store.get_visible(tenant, task)[0].tenant
        return self._stats.get((tenant, owner, task))

    def iter_changes(self, tenant: str | None, *, after: int, task: str | None) -> Iterator[AuditEntry]:
        """The audit log of one tenant or (None) of all, oldest first."""
        with client_errors():
            yield from self._store.iter_audit(tenant, after=after, task=task)

    def iter_receipts(
        self, tenant: str | None, *, after: int, task: str | None, request_id: str | None
    ) -> Iterator[Receipt]:
        """Receipts of one tenant's requests or (None) of all, oldest first."""
        with client_errors():
            yield from self._store.iter_receipts(tenant, after=after, task=task, request_id=request_id)

    def refresh(self, *, pins_too: bool = True) -> None:
        """Tells the metrics how many prompts there are, and the engine what is pinned; without `pins_too`, only if that
        has changed since it was told.
        """
        # Read and told as one: of two threads, the one that read first could otherwise have the last word.
        with client_errors(), self._refreshing:
            pins = self._store.pins()
            if pins_too or pins != self._pins:
                self._engine.pin([to_ref(version) for version in self._store.pinned_versions()])
                self._pins = pins
            self._metrics.prompts_registered.set(self._store.num_versions())

    def _resolve(self, tenant: str, reference: str, request_id: str | None) -> PromptRef | None:
        if reference == self._backbone_name:
            return None
        with client_errors():
            return to_ref(self._store.resolve(tenant, reference, request_id=request_id))

    def _owner_for_write(self, caller: Caller, task: str) -> str:
        if caller.can("admin"):
            return self._store.get_visible(caller.tenant, task)[0].tenant
        return self._store.get_task(caller.tenant, task).tenant

    def _view(self, task: Task, active: PromptVersion | None) -> TaskView:
        residency = "store" if active is None else self._engine.residency(resident_key(active))
        return TaskView(task, active, residency)

    def _view_version(self, version: PromptVersion) -> VersionView:
        return VersionView(version, self._engine.residency(resident_key(version)))

    def _find_version(self, task: Task, version: int) -> PromptVersion | None:
        try:
            return self._store.get_version(task.tenant, task.task, version)
        except store_errors.TaskNotFound:
            # Deleted, or another version made active, since the task was read.
            return None

    def _versions_of(self, owner: str, task: str) -> list[PromptVersion]:
        found: list[PromptVersion] = []
        after: int | None = None
        while versions := self._store.list_versions(owner, task, limit=_PAGE, after=after):
            found.extend(versions)
            after = versions[-1].version
        return found

    def _evict(self, deleted: Sequence[PromptVersion]) -> None:
        """Have the engine forget these, but for those whose file another version of the tenant's still has."""
        for version in deleted:
            if not self._store.has_prefix(version.tenant, version.prefix_key):
                self._engine.evict(resident_key(version))
