"""Tasks and their prompt versions as a caller sees them.

Owns which tenant a name is looked up in (the caller's own, then `shared`; writing to `shared` needs the scope `admin`),
and what a change in the store means for the engine: what is deleted is evicted, what is pinned stays resident. Refuses
to know HTTP. Every method may block on the disk: call them in a thread. All raise the errors of `server.errors`.
"""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_store import errors as store_errors
from prompt_store.manifest import PromptVersion, SoftPrompt, Task
from prompt_store.names import SHARED_TENANT
from prompt_store.store import PromptStore
from server.engine.request import PromptRef
from server.errors import PromptCorruptError
from server.metrics import Metrics
from server.runtime.protocols import EngineLike, Residency
from server.runtime.stats import TaskStats, TaskStatsTable
from server.runtime.store_errors import client_errors
from server.tenancy.keys import Caller

_PAGE = 500


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
    """The store and the engine's residency, seen by one caller at a time. Thread-safe."""

    def __init__(
        self, store: PromptStore, engine: EngineLike, stats: TaskStatsTable, metrics: Metrics, backbone_name: str
    ) -> None:
        self._store = store
        self._engine = engine
        self._stats = stats
        self._metrics = metrics
        self._backbone_name = backbone_name
        self._refreshing = threading.Lock()

    def resolve_all(self, tenant: str, references: Sequence[str]) -> dict[str, PromptRef | None]:
        """What each distinct reference stands for now; None for the bare backbone."""
        return {reference: self._resolve(tenant, reference) for reference in dict.fromkeys(references)}

    def find(self, tenant: str, reference: str) -> PromptVersion:
        """The version that a reference (`task`, `task@7`, `task@sha256:…`) stands for now."""
        with client_errors():
            return self._store.resolve(tenant, reference)

    def list_tasks(self, tenant: str, *, limit: int, after: str | None) -> tuple[list[TaskView], bool]:
        """Tasks that the tenant can call, its own and the shared ones, by name; whether there are more."""
        with client_errors():
            found = list(itertools.islice(self._visible_tasks(tenant, after), limit + 1))
            return [self._view(task) for task in found[:limit]], len(found) > limit

    def list_callable(self, tenant: str) -> list[TaskView]:
        """All tasks with an active version."""
        with client_errors():
            return [self._view(task) for task in self._visible_tasks(tenant, None) if task.active_version is not None]

    def get_task(self, tenant: str, task: str) -> TaskView:
        with client_errors():
            return self._view(self._find_task(tenant, task))

    def list_versions(self, tenant: str, task: str, *, limit: int, after: int | None) -> tuple[list[VersionView], bool]:
        with client_errors():
            owner = self._find_task(tenant, task).tenant
            versions = self._store.list_versions(owner, task, limit=limit + 1, after=after)
            return [self._view_version(version) for version in versions[:limit]], len(versions) > limit

    def get_version(self, tenant: str, task: str, version: int) -> VersionView:
        with client_errors():
            owner = self._find_task(tenant, task).tenant
            return self._view_version(self._store.get_version(owner, task, version))

    def read_file(self, version: PromptVersion) -> bytes:
        with client_errors():
            return self._store.read_file(version)

    def read_config(self, version: PromptVersion) -> bytes:
        with client_errors():
            return self._store.read_config(version)

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
                created_by=caller.key_id or "",
            )
            self.refresh()
            return self._view_version(version), is_new

    def update_task(
        self,
        caller: Caller,
        task: str,
        *,
        active_version: int | None,
        expected_version: int | None,
        pinned: bool | None,
    ) -> TaskView:
        """Rolls out, rolls back, pins. Rows that are running keep the version that they hold."""
        with client_errors():
            owner = self._owner_for_write(caller, task)
            updated = self._store.update_task(
                owner,
                task,
                active_version=active_version,
                expected_version=expected_version,
                pinned=pinned,
                actor=caller.key_id or "",
            )
            self.refresh()
            return self._view(updated)

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
            owner = self._find_task(tenant, task).tenant
        return self._stats.get((tenant, owner, task))

    def refresh(self) -> None:
        """Tells the engine what is pinned, and the metrics how many prompts there are."""
        # Read and told as one: of two threads, the one that read first could otherwise have the last word.
        with client_errors(), self._refreshing:
            self._engine.pin([to_ref(version) for version in self._store.pinned_versions()])
            self._metrics.prompts_registered.set(self._store.counts().num_versions)

    def _resolve(self, tenant: str, reference: str) -> PromptRef | None:
        return None if reference == self._backbone_name else to_ref(self.find(tenant, reference))

    def _visible_tasks(self, tenant: str, after: str | None) -> Iterator[Task]:
        """The tenant's own tasks and the shared ones that no own name shadows, by name."""
        while True:
            shared = self._store.list_tasks(SHARED_TENANT, limit=_PAGE, after=after)
            own = self._store.list_tasks(tenant, limit=_PAGE, after=after) if tenant != SHARED_TENANT else []
            found = {task.task: task for task in (*shared, *own)}
            # Beyond the first page's worth of names, either list may have gaps that its next page fills.
            names = sorted(found)[:_PAGE]
            yield from (found[name] for name in names if not self._is_shadowed(tenant, found[name]))
            if len(shared) < _PAGE and len(own) < _PAGE and len(names) == len(found):
                return
            after = names[-1]

    def _find_task(self, tenant: str, task: str) -> Task:
        try:
            return self._store.get_task(tenant, task)
        except store_errors.TaskNotFound:
            if tenant == SHARED_TENANT:
                raise
            shared = self._store.get_task(SHARED_TENANT, task)
            if self._is_shadowed(tenant, shared):
                raise
            return shared

    def _is_shadowed(self, tenant: str, task: Task) -> bool:
        """Whether a shared task is out of the tenant's reach because it has, or had, one of that name itself."""
        if task.tenant == tenant or task.active_version is None:
            return False
        try:
            return self._store.resolve(tenant, task.task).tenant != task.tenant
        except store_errors.TaskNotFound:
            return True

    def _owner_for_write(self, caller: Caller, task: str) -> str:
        if caller.can("admin"):
            return self._find_task(caller.tenant, task).tenant
        return self._store.get_task(caller.tenant, task).tenant

    def _view(self, task: Task) -> TaskView:
        if task.active_version is None:
            return TaskView(task, None, "store")
        try:
            active = self._store.get_version(task.tenant, task.task, task.active_version)
        except store_errors.TaskNotFound:
            # Deleted, or another version made active, since the task was read.
            return TaskView(task, None, "store")
        return TaskView(task, active, self._engine.residency(resident_key(active)))

    def _view_version(self, version: PromptVersion) -> VersionView:
        return VersionView(version, self._engine.residency(resident_key(version)))

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
