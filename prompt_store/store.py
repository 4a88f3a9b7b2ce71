"""PromptStore: the one door to the prompts. Puts blobs, catalog, keys, locks and cache together.

Owns the order of things: blobs are durable before the row that refers to them commits, and a blob is removed only after
the row is gone. So `kill -9` at any instant leaves the old or the new state, and at worst files that the next start
sweeps. Knows nothing of HTTP, devices or models beyond a BackboneShape.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_store import failpoints
from prompt_store.catalog import Stored
from prompt_store.errors import InvalidName, PromptStoreError
from prompt_store.faults import storage_errors
from prompt_store.formats import check_file, read_soft_prompt
from prompt_store.intake import check_metadata, check_size, make_gate, read_upload
from prompt_store.listings import Listings, SeenTask
from prompt_store.manifest import (
    BackboneShape,
    CanaryChange,
    GateStatus,
    PromptVersion,
    Quota,
    SoftPrompt,
    StoreCounts,
    Task,
)
from prompt_store.names import check_task_name, check_tenant_name, check_text, not_found, parse_reference
from prompt_store.probes import Probe, read_probes
from prompt_store.resolve_cache import Resolved
from prompt_store.rollout import is_canarys
from prompt_store.rows import Upload, check_backbone, check_usable
from prompt_store.training import TrainingStore

# A thousand, and the one that shows that there are more.
_MAX_PAGE = 1001
# What a gate's check has to tell, such as the probes that it did not pass.
_MAX_DETAIL_BYTES = 64 * 1024


class PromptStore(TrainingStore):
    """Prompts, tasks and keys in one folder. Made by `open`; all methods may be called from any thread. They raise
    PromptStoreErrors only: StorageFailed when the folder cannot be read or written, StorageFull when there is no space
    left, and what their own docstrings say.
    """

    def use_backbone(self, backbone: BackboneShape) -> None:
        """Say what prompts must fit; for servers that open the store before the backbone is loaded."""
        self._backbone = backbone

    # Prompts

    def upload(
        self,
        tenant: str,
        task: str,
        *,
        file: bytes | Path,
        config: bytes,
        activate: bool = True,
        expected_version: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        task_index: int | None = None,
        training_run: str | None = None,
        data_digest: str | None = None,
        probes: bytes | None = None,
        gate_threshold: float | None = None,
        quota: Quota | None = None,
        created_by: str = "",
    ) -> tuple[PromptVersion, bool]:
        """Check and register a prompt. True: a new version; False: the task already has these bytes, and they are now
        active if `activate` says so.

        `expected_version` is compared with the active version (0: the task must not exist); a repeated upload that
        needs no change succeeds anyway. With `gate_threshold` the version stays inactive until `set_gate` says that it
        passed its `probes`; `activate` is for then. `quota` bounds what the tenant has after the upload.

        Raises UnsupportedFile, FileTooLarge, PromptMismatch, InvalidConfig, InvalidName, InvalidValue, VersionConflict,
        GateNotPassed (a gate from before forbids to activate these bytes), QuotaExceeded. On any error nothing is
        registered.
        """
        check_tenant_name(tenant)
        backbone = self._need_backbone()
        if check_task_name(task) == backbone.name:
            raise InvalidName(f"{task} is the backbone's own name.", param="task")
        for text, param in ((created_by, "created_by"), (training_run, "training_run"), (data_digest, "data_digest")):
            check_text(text or "", param)
        check_size("adapter_config.json", config, self.limits.max_config_bytes, "config")
        num_probes = 0 if probes is None else len(read_probes(probes, self.limits))
        gate = make_gate(gate_threshold, num_probes, activates=activate)
        file_bytes = read_upload(file, self.limits.max_file_bytes)
        checked = check_file(file_bytes, config, backbone=backbone, task_index=task_index)
        upload = Upload(
            tenant=tenant,
            task=task,
            checked=checked,
            config_digest=hashlib.sha256(config).hexdigest(),
            metadata=check_metadata(metadata, self.limits.max_metadata_bytes),
            backbone=backbone,
            created_by=created_by,
            activate=activate and gate is None,
            expected_version=expected_version,
            training_run=training_run,
            data_digest=data_digest,
            gate=gate,
            probes_digest=None if probes is None else hashlib.sha256(probes).hexdigest(),
            quota=quota,
        )
        blobs = {
            failpoints.UPLOAD_CONFIG_STORED: config,
            failpoints.UPLOAD_FILE_STORED: file_bytes,
            failpoints.UPLOAD_PROBES_STORED: probes,
        }
        digests = tuple(
            digest for digest in (upload.config_digest, checked.digest, upload.probes_digest) if digest is not None
        )
        with storage_errors(), self._changing(tenant, task):
            settled = self._catalog.find_settled(upload)
            if settled is not None:
                return settled, False
            try:
                for failpoint, blob in blobs.items():
                    if blob is not None:
                        self._blobs.put(blob)
                    failpoints.hit(failpoint)
                version, created, stale = self._catalog.register(upload)
            except BaseException:
                self._custody.collect(digests)
                raise
            # Probes that the version did not take were stored for nothing.
            self._custody.collect(stale if upload.probes_digest is None else (*stale, upload.probes_digest))
        failpoints.hit(failpoints.UPLOAD_COMMITTED)
        return version, created

    def resolve(self, tenant: str, reference: str, *, request_id: str | None = None) -> PromptVersion:
        """The version meant by `task`, `task@7` or `task@sha256:<hex>`: the tenant's own, else the shared tenant's.

        For a task with a canary, `request_id` decides between it and the active version, always in the same way; None
        means the active version. An own name shadows the shared one even while no version of it is active, and after it
        was deleted: whom a name means never changes silently. Its gate comes without detail. Raises TaskNotFound, with
        one message for unknown, foreign and malformed ones.
        """
        return _choose(self._find(tenant, reference), request_id)

    def resolve_remembered(self, tenant: str, reference: str, *, request_id: str | None = None) -> PromptVersion | None:
        """As `resolve`, where that takes no look at the database; else None. Never blocks, never raises."""
        found = self._cache.peek((tenant, reference))
        return None if found is None else _choose(found, request_id)

    def load(self, version: PromptVersion) -> SoftPrompt:
        """The numbers of a version, its digests verified now, and checked against the backbone now in force.

        Raises PromptCorrupt (and quarantines the version) when bytes are damaged or missing, PromptMismatch when it was
        uploaded for another backbone, TaskNotFound when it was deleted.
        """
        backbone = self._need_backbone()
        stored = self._get_sound(version)
        check_backbone(stored.version, backbone)
        file_bytes = self._custody.read(version, version.digest)
        config_bytes = self._custody.read(version, stored.config_digest)
        return read_soft_prompt(file_bytes, config_bytes, backbone=backbone, task_index=stored.version.task_index)

    def read_file(self, version: PromptVersion) -> bytes:
        """adapter_model.safetensors as uploaded. Raises as `load` does."""
        return self._custody.read(version, self._get_sound(version).version.digest)

    def read_config(self, version: PromptVersion) -> bytes:
        """adapter_config.json as uploaded. Raises as `load` does."""
        return self._custody.read(version, self._get_sound(version).config_digest)

    def read_probes(self, version: PromptVersion) -> tuple[Probe, ...]:
        """The probe set that came with the version, empty if none did. Raises as `load` does."""
        digest = self._get_sound(version).version.probes_digest
        return () if digest is None else read_probes(self._custody.read(version, digest), self.limits)

    def get_version(self, tenant: str, task: str, version: int) -> PromptVersion:
        """Raises TaskNotFound."""
        return self._catalog.get_stored(tenant, task, version).version

    def list_versions(
        self, tenant: str, task: str, *, limit: int = 100, after: int | None = None
    ) -> list[PromptVersion]:
        """Newest first, at most 1001; `after` is the lowest number already seen. Raises TaskNotFound."""
        return self._catalog.list_versions(tenant, task, _page(limit), after)

    def pinned_versions(self) -> list[PromptVersion]:
        """The active versions of pinned tasks, of all tenants."""
        return self._catalog.pinned_versions()

    def pins(self) -> frozenset[tuple[str, str, int]]:
        """Tenant, task and active version of pinned tasks: what `pinned_versions` would give, at less cost."""
        return self._catalog.pins()

    def has_prefix(self, tenant: str, prefix_key: str) -> bool:
        """Whether any version of the tenant's has this `prefix_key`: two versions with the same file have the same."""
        return self._catalog.has_prefix(tenant, prefix_key)

    def set_gate(
        self,
        tenant: str,
        task: str,
        version: int,
        *,
        status: GateStatus,
        score: float | None = None,
        detail: Mapping[str, Any] | None = None,
        measured: PromptVersion | None = None,
        actor: str = "",
    ) -> PromptVersion:
        """Say how far the check of a version's gate has come.

        `measured` is the version as it was when its check began. VersionConflict is raised when the probes or what the
        gate asks for are others by now, for what was found says nothing of them, and when the gate has ended.

        `passed` makes the version active in the same transaction if its gate activates; when another version than at
        the upload is active by now, the gate's status becomes `conflict` instead. `pending` and `running` forget the
        score; `pending` after an end begins anew, against what is active now. Raises TaskNotFound, or InvalidValue for
        a version without a gate.
        """
        check_text(actor, "actor")
        kept = check_metadata(detail, _MAX_DETAIL_BYTES, "detail")
        with storage_errors(), self._changing(tenant, task):
            found = self._catalog.set_gate(
                tenant, task, version, status=status, score=score, detail=kept, measured=measured, actor=actor
            )
        failpoints.hit(failpoints.ACTIVATE_COMMITTED)
        return found

    def unfinished_gates(self) -> list[PromptVersion]:
        """Versions of all tenants whose gate is pending or running, oldest first."""
        return self._catalog.unfinished_gates()

    def delete_version(self, tenant: str, task: str, version: int, *, actor: str = "") -> None:
        """Its number is not used again. Raises TaskNotFound, or VersionActive for the active one and the canary."""
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant, task):
            digests = self._catalog.delete_version(tenant, task, version, actor)
            failpoints.hit(failpoints.DELETE_COMMITTED)
            self._custody.collect(digests)

    # Tasks

    def get_task(self, tenant: str, task: str) -> Task:
        """Raises TaskNotFound."""
        return self._catalog.get_task(tenant, task)

    def list_tasks(self, tenant: str, *, limit: int = 100, after: str | None = None) -> list[Task]:
        """By name, at most 1001; `after` is the last name already seen."""
        return self._catalog.list_tasks(tenant, _page(limit), after)

    def get_visible(self, tenant: str, task: str) -> SeenTask:
        """A task that the tenant can see, its own or a shared one, with its active version. Raises TaskNotFound."""
        return self._listings.get_visible(tenant, task)

    def list_visible(self, tenant: str, *, limit: int = 100, after: str | None = None) -> list[SeenTask]:
        """As `list_tasks`, of all that the tenant can see, its own and shared ones, each with its active version."""
        return self._listings.list_visible(tenant, _page(limit), after)

    def list_callable(self, tenant: str, *, limit: int = 100, after: str | None = None) -> list[Task]:
        """As `list_visible`, tasks with an active version alone, without it."""
        return self._listings.list_callable(tenant, _page(limit), after)

    def update_task(
        self,
        tenant: str,
        task: str,
        *,
        active_version: int | None = None,
        expected_version: int | None = None,
        pinned: bool | None = None,
        canary: CanaryChange = "keep",
        actor: str = "",
    ) -> Task:
        """Change all that is given, or nothing. `canary` None takes it away; a version made active is no canary.

        Raises TaskNotFound, VersionConflict (`expected_version` is not active, or the canary is), InvalidValue,
        GateNotPassed or PromptCorrupt (the version to answer is quarantined).
        """
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant, task):
            result = self._catalog.update_task(
                tenant,
                task,
                active_version=active_version,
                expected_version=expected_version,
                pinned=pinned,
                canary=canary,
                actor=actor,
            )
        failpoints.hit(failpoints.ACTIVATE_COMMITTED)
        return result

    def rollback(self, tenant: str, task: str, to: int | None = None, *, actor: str = "") -> Task:
        """Activate version `to`, or (None) undo the last activation: repeated calls go further back, as far as 64.

        Deleted and quarantined versions, and those that a gate holds back, are passed over. Raises TaskNotFound,
        PromptCorrupt (`to` is quarantined), GateNotPassed (`to` is held back), or VersionConflict when nothing was
        active before.
        """
        if to is not None:
            return self.update_task(tenant, task, active_version=to, actor=actor)
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant, task):
            result = self._catalog.rollback(tenant, task, actor)
        failpoints.hit(failpoints.ACTIVATE_COMMITTED)
        return result

    def delete_task(self, tenant: str, task: str, *, actor: str = "") -> None:
        """Remove all versions; the name stays retired in this tenant. Raises TaskNotFound."""
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant, task):
            digests = self._catalog.delete_task(tenant, task, actor)
            failpoints.hit(failpoints.DELETE_COMMITTED)
            self._custody.collect(digests)

    # Totals

    def num_versions(self) -> int:
        """Of all tenants; far cheaper than `counts`."""
        return self._catalog.num_versions()

    def counts(self) -> StoreCounts:
        """Totals over all tenants."""
        return self._catalog.counts()

    def check_invariants(self) -> None:
        """Every reference has its sound blob, every blob a reference. Reads all files: for tests."""
        self._custody.check_invariants()

    # Inside

    @property
    def _listings(self) -> Listings:
        return Listings(self._database)

    def _find(self, tenant: str, reference: str) -> Resolved:
        key = (tenant, reference)
        found = self._cache.get(key)
        if found is not None:
            return found
        parsed = parse_reference(reference)
        if parsed is None:
            raise not_found(reference)
        generation = self._cache.generation
        found = self._catalog.resolve(tenant, parsed)
        if found is None:
            raise not_found(reference)
        self._cache.put(key, found, generation)
        return found

    def _get_sound(self, version: PromptVersion) -> Stored:
        stored = self._catalog.get_stored(version.tenant, version.task, version.version)
        if stored.version.digest != version.digest:
            raise not_found(f"{version.task}@sha256:{version.digest}")
        check_usable(stored.version)
        return stored

    def _need_backbone(self) -> BackboneShape:
        if self._backbone is None:
            raise PromptStoreError("The store does not know yet which backbone its prompts must fit.")
        lower = min(self._backbone.max_virtual_tokens, self.limits.max_virtual_tokens)
        return dataclasses.replace(self._backbone, max_virtual_tokens=lower)


def _choose(found: Resolved, request_id: str | None) -> PromptVersion:
    version = found.version
    if found.canary is None or request_id is None:
        return version
    return found.canary if is_canarys(request_id, version.tenant, version.task, found.percent) else version


def _page(limit: int) -> int:
    return min(max(limit, 1), _MAX_PAGE)
