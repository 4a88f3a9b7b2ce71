"""PromptStore: the one door to the prompts. Puts blobs, catalog, keys, locks and cache together.

Owns the order of things: blobs are durable before the row that refers to them commits, and a blob is removed only after
the row is gone. So `kill -9` at any instant leaves the old or the new state, and at worst files that the next start
sweeps. Knows nothing of HTTP, devices or models beyond a BackboneShape.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import URL

from prompt_store import failpoints, migrate
from prompt_store.audit import append_audit, iter_audit
from prompt_store.blobs import BlobStore, FileBlobs
from prompt_store.catalog import Catalog, Stored
from prompt_store.custody import Custody
from prompt_store.database import Database
from prompt_store.errors import InvalidName, PromptStoreError
from prompt_store.faults import storage_errors
from prompt_store.formats import check_file, read_soft_prompt
from prompt_store.intake import check_metadata, check_size, read_upload
from prompt_store.keyring import Keyring
from prompt_store.locks import FolderLock, WriteLock
from prompt_store.manifest import (
    AuditEntry,
    BackboneShape,
    Key,
    PromptVersion,
    SoftPrompt,
    StoreCounts,
    StoreLimits,
    Task,
)
from prompt_store.names import check_task_name, check_tenant_name, check_text, not_found, parse_reference
from prompt_store.resolve_cache import ResolveCache
from prompt_store.rows import Upload, check_backbone, check_usable

_MAX_PAGE = 1000


class PromptStore:
    """Prompts, tasks and keys in one folder. Made by `open`; all methods may be called from any thread. They raise
    PromptStoreErrors only: StorageFailed when the folder cannot be read or written, StorageFull when there is no space
    left, and what their own docstrings say.
    """

    def __init__(
        self,
        root: Path,
        *,
        database: Database,
        blobs: BlobStore,
        write_lock: WriteLock,
        folder_lock: FolderLock | None,
        backbone: BackboneShape | None,
        limits: StoreLimits,
    ) -> None:
        self.root = root
        self.limits = limits
        self._database = database
        self._blobs = blobs
        self._write_lock = write_lock
        self._folder_lock = folder_lock
        self._backbone = backbone
        self._catalog = Catalog(database)
        self._keyring = Keyring(database)
        self._custody = Custody(self._catalog, blobs, self._changing)
        self._cache = ResolveCache(database.change_token)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        backbone: BackboneShape | None = None,
        limits: StoreLimits | None = None,
        exclusive: bool = True,
    ) -> Self:
        """Open the store in folder `root`, made and migrated if need be.

        With `exclusive` the folder is this process's until `close`, and leftovers of interrupted writes are swept;
        without, it is opened beside whoever serves it. Raises StoreInUse, StorageFailed or StorageFull.
        """
        with contextlib.ExitStack() as undo, storage_errors():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder_lock = FolderLock(root / "store.lock") if exclusive else None
            if folder_lock is not None:
                undo.callback(folder_lock.release)
            write_lock = WriteLock(root / "write.lock")
            undo.callback(write_lock.close)
            database = Database(URL.create("sqlite", database=str(root / "catalog.sqlite3")))
            undo.callback(database.close)
            blobs = FileBlobs(root)
            with write_lock:
                migrate.upgrade(database.engine)
                if exclusive:
                    blobs.sweep_temp_files()
            store = cls(
                root,
                database=database,
                blobs=blobs,
                write_lock=write_lock,
                folder_lock=folder_lock,
                backbone=backbone,
                limits=limits or StoreLimits(),
            )
            if exclusive:
                store._custody.sweep()
            undo.pop_all()
        return store

    def close(self) -> None:
        """Give the folder back. A second call does nothing."""
        self._write_lock.close()
        self._database.close()
        if self._folder_lock is not None:
            self._folder_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
        created_by: str = "",
    ) -> tuple[PromptVersion, bool]:
        """Check and register a prompt. True: a new version; False: the task already has these bytes, and they are now
        active if `activate` says so.

        `expected_version` is compared with the active version (0: the task must not exist); a repeated upload that
        needs no change succeeds anyway. Raises UnsupportedFile, FileTooLarge, PromptMismatch, InvalidConfig,
        InvalidName, InvalidValue, VersionConflict. On any error nothing is registered.
        """
        check_tenant_name(tenant)
        backbone = self._need_backbone()
        if check_task_name(task) == backbone.name:
            raise InvalidName(f"{task} is the backbone's own name.", param="task")
        check_text(created_by, "created_by")
        check_size("adapter_config.json", config, self.limits.max_config_bytes, "config")
        file_bytes = read_upload(file, self.limits.max_file_bytes)
        checked = check_file(file_bytes, config, backbone=backbone, task_index=task_index)
        upload = Upload(
            tenant=tenant,
            task=task,
            checked=checked,
            config_digest=hashlib.sha256(config).hexdigest(),
            metadata=check_metadata(metadata, self.limits.max_metadata_bytes),
            backbone=backbone.fingerprint,
            created_by=created_by,
            activate=activate,
            expected_version=expected_version,
        )
        with storage_errors(), self._changing():
            settled = self._catalog.find_settled(upload)
            if settled is not None:
                return settled, False
            try:
                self._blobs.put(config)
                failpoints.hit(failpoints.UPLOAD_CONFIG_STORED)
                self._blobs.put(file_bytes)
                failpoints.hit(failpoints.UPLOAD_FILE_STORED)
                version, created, stale = self._catalog.register(upload)
            except BaseException:
                self._custody.collect((upload.config_digest, checked.digest))
                raise
            self._custody.collect(stale)
            failpoints.hit(failpoints.UPLOAD_COMMITTED)
        return version, created

    def resolve(self, tenant: str, reference: str) -> PromptVersion:
        """The version meant by `task`, `task@7` or `task@sha256:<hex>`: the tenant's own, else the shared tenant's.

        An own name shadows the shared one even while no version of it is active, and after it was deleted: whom a name
        means never changes silently. Raises TaskNotFound, with one message for unknown, foreign and malformed ones.
        """
        key = (tenant, reference)
        version = self._cache.get(key)
        if version is not None:
            return version
        parsed = parse_reference(reference)
        if parsed is None:
            raise not_found(reference)
        generation = self._cache.generation
        version = self._catalog.resolve(tenant, parsed)
        if version is None:
            raise not_found(reference)
        self._cache.put(key, version, generation)
        return version

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

    def get_version(self, tenant: str, task: str, version: int) -> PromptVersion:
        """Raises TaskNotFound."""
        return self._catalog.get_stored(tenant, task, version).version

    def list_versions(
        self, tenant: str, task: str, *, limit: int = 100, after: int | None = None
    ) -> list[PromptVersion]:
        """Newest first, at most 1000; `after` is the lowest number already seen. Raises TaskNotFound."""
        return self._catalog.list_versions(tenant, task, _page(limit), after)

    def pinned_versions(self) -> list[PromptVersion]:
        """The active versions of pinned tasks, of all tenants."""
        return self._catalog.pinned_versions()

    def has_prefix(self, tenant: str, prefix_key: str) -> bool:
        """Whether any version of the tenant's has this `prefix_key`: two versions with the same file have the same."""
        return self._catalog.has_prefix(tenant, prefix_key)

    def delete_version(self, tenant: str, task: str, version: int, *, actor: str = "") -> None:
        """Its number is not used again. Raises TaskNotFound, or VersionActive for the active one."""
        check_text(actor, "actor")
        with storage_errors(), self._changing():
            digests = self._catalog.delete_version(tenant, task, version, actor)
            failpoints.hit(failpoints.DELETE_COMMITTED)
            self._custody.collect(digests)

    # Tasks

    def get_task(self, tenant: str, task: str) -> Task:
        """Raises TaskNotFound."""
        return self._catalog.get_task(tenant, task)

    def list_tasks(self, tenant: str, *, limit: int = 100, after: str | None = None) -> list[Task]:
        """By name, at most 1000; `after` is the last name already seen."""
        return self._catalog.list_tasks(tenant, _page(limit), after)

    def update_task(
        self,
        tenant: str,
        task: str,
        *,
        active_version: int | None = None,
        expected_version: int | None = None,
        pinned: bool | None = None,
        actor: str = "",
    ) -> Task:
        """Change all that is given, or nothing.

        Raises TaskNotFound, VersionConflict (`expected_version` is not active) or PromptCorrupt (`active_version` is
        quarantined).
        """
        check_text(actor, "actor")
        with storage_errors(), self._changing():
            result = self._catalog.update_task(
                tenant,
                task,
                active_version=active_version,
                expected_version=expected_version,
                pinned=pinned,
                actor=actor,
            )
            failpoints.hit(failpoints.ACTIVATE_COMMITTED)
        return result

    def rollback(self, tenant: str, task: str, to: int | None = None, *, actor: str = "") -> Task:
        """Activate version `to`, or (None) undo the last activation: repeated calls go further back, as far as 64.

        Deleted and quarantined versions are passed over. Raises TaskNotFound, PromptCorrupt (`to` is quarantined), or
        VersionConflict when nothing was active before.
        """
        if to is not None:
            return self.update_task(tenant, task, active_version=to, actor=actor)
        check_text(actor, "actor")
        with storage_errors(), self._changing():
            result = self._catalog.rollback(tenant, task, actor)
            failpoints.hit(failpoints.ACTIVATE_COMMITTED)
        return result

    def delete_task(self, tenant: str, task: str, *, actor: str = "") -> None:
        """Remove all versions; the name stays retired in this tenant. Raises TaskNotFound."""
        check_text(actor, "actor")
        with storage_errors(), self._changing():
            digests = self._catalog.delete_task(tenant, task, actor)
            failpoints.hit(failpoints.DELETE_COMMITTED)
            self._custody.collect(digests)

    # Keys, audit, totals

    def create_key(self, tenant: str, scopes: Collection[str], label: str = "", *, actor: str = "") -> tuple[Key, str]:
        """A new key and its secret, which is not kept. Raises InvalidName or InvalidValue."""
        with storage_errors(), self._changing():
            return self._keyring.create_key(tenant, scopes, label, check_text(actor, "actor"))

    def verify_key(self, secret: str) -> Key | None:
        """The key that `secret` proves; None for a wrong or revoked one."""
        return self._keyring.verify_key(secret)

    def list_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        return self._keyring.list_keys()

    def revoke_key(self, key_id: str, *, actor: str = "") -> Key:
        """Idempotent. Raises KeyNotFound."""
        with storage_errors(), self._changing():
            return self._keyring.revoke_key(key_id, check_text(actor, "actor"))

    def has_keys(self) -> bool:
        """True once any key was made, also when all are revoked: revoking the last must not open the server."""
        return self._keyring.has_keys()

    def audit(
        self,
        tenant: str,
        *,
        actor: str,
        action: str,
        task: str | None = None,
        version: int | None = None,
        digest: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an entry of the caller's own. What this class does, it logs by itself."""
        with storage_errors(), self._write_lock, self._database.writing() as session:
            append_audit(
                session, tenant, actor=actor, action=action, task=task, version=version, digest=digest, detail=detail
            )

    def iter_audit(self, tenant: str | None = None, *, after: int = 0) -> Iterator[AuditEntry]:
        """Entries with an id above `after`, oldest first, of one tenant or (None) of all."""
        return iter_audit(self._database, tenant, after)

    def counts(self) -> StoreCounts:
        """Totals over all tenants."""
        return self._catalog.counts()

    def check_invariants(self) -> None:
        """Every reference has its sound blob, every blob a reference. Reads all files: for tests."""
        self._custody.check_invariants()

    # Inside

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._write_lock:
            try:
                yield
            finally:
                self._cache.clear()

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


def _page(limit: int) -> int:
    return min(max(limit, 1), _MAX_PAGE)
