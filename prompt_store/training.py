"""The store's door to training: files of examples, and the jobs that make prompts of them.

Owns the locking and the order of things: a file's bytes are durable before the row that refers to them commits, and go
after it. What the rows may do is in `training_records`; how a prompt is made is not known here.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from prompt_store.faults import storage_errors
from prompt_store.intake import check_metadata
from prompt_store.names import check_task_name, check_tenant_name, check_text
from prompt_store.tenants import TenantStore
from prompt_store.training_records import TrainingRecords
from prompt_store.training_values import JobStatus, TrainingEvent, TrainingFile, TrainingJob

_MAX_SPEC_BYTES = 1024 * 1024
_MAX_RESULT_BYTES = 64 * 1024
_MAX_FILES = 10_001
_MAX_PAGE = 1001


class TrainingStore(TenantStore):
    # Files

    def add_training_file(
        self,
        tenant: str,
        data: bytes,
        *,
        filename: str,
        num_examples: int,
        max_tenant_bytes: int | None = None,
        created_by: str = "",
    ) -> TrainingFile:
        """Keep a file of examples, which the caller has read. Raises InvalidName, InvalidValue or QuotaExceeded; on any
        error nothing is kept.
        """
        file = TrainingFile(
            id="",
            tenant=check_tenant_name(tenant),
            filename=check_text(filename, "filename"),
            digest=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            num_examples=num_examples,
            created_at=datetime.now(UTC),
            created_by=check_text(created_by, "created_by"),
        )
        with storage_errors(), self._changing(tenant):
            try:
                self._blobs.put(data)
                return self._training.add_file(file, max_tenant_bytes=max_tenant_bytes)
            except BaseException:
                self._custody.collect((file.digest,))
                raise

    def get_training_file(self, tenant: str, file_id: str) -> TrainingFile:
        """Raises TrainingNotFound, with one message for unknown and foreign ones."""
        return self._training.get_file(tenant, file_id)

    def list_training_files(
        self, tenant: str, *, limit: int = 100, after: str | None = None, newest_first: bool = True
    ) -> list[TrainingFile]:
        """At most 10001; `after` is the last id already seen. Raises TrainingNotFound for an unknown one."""
        return self._training.list_files(
            tenant, limit=min(max(limit, 1), _MAX_FILES), after=after, newest_first=newest_first
        )

    def read_training_file(self, file: TrainingFile) -> bytes:
        """Its bytes, the digest verified. Raises PromptCorrupt when they are damaged or missing."""
        with storage_errors():
            return self._blobs.get(file.digest)

    def delete_training_file(self, tenant: str, file_id: str, *, actor: str = "") -> None:
        """Raises TrainingNotFound, or VersionConflict while a job that has not ended needs it."""
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant):
            digest = self._training.delete_file(tenant, file_id, actor=actor)
            self._custody.collect((digest,))

    # Jobs

    def add_training_job(
        self,
        tenant: str,
        task: str,
        *,
        training_file: str,
        validation_file: str | None,
        spec: Mapping[str, Any],
        max_unfinished: int | None = None,
        created_by: str = "",
    ) -> TrainingJob:
        """Queue a job. Raises InvalidName, TrainingNotFound for a file that is not the tenant's, VersionConflict for a
        retired name, or TooManyJobs.
        """
        with storage_errors(), self._changing(tenant):
            return self._training.add_job(
                tenant=check_tenant_name(tenant),
                task=check_task_name(task),
                training_file=training_file,
                validation_file=validation_file,
                spec=check_metadata(spec, _MAX_SPEC_BYTES, "spec"),
                created_by=check_text(created_by, "created_by"),
                max_unfinished=max_unfinished,
            )

    def get_training_job(self, tenant: str, job_id: str) -> TrainingJob:
        """Raises TrainingNotFound, with one message for unknown and foreign ones."""
        return self._training.get_job(tenant, job_id)

    def list_training_jobs(self, tenant: str, *, limit: int = 20, after: str | None = None) -> list[TrainingJob]:
        """Newest first, at most 1001. Raises TrainingNotFound for an unknown `after`."""
        return self._training.list_jobs(tenant, limit=min(max(limit, 1), _MAX_PAGE), after=after)

    def list_training_events(
        self, tenant: str, job_id: str, *, limit: int = 20, after: int | None = None
    ) -> tuple[TrainingJob, list[TrainingEvent]]:
        """The job and its events, newest first, at most 1001; `after` is the lowest serial already seen."""
        return self._training.list_events(tenant, job_id, limit=min(max(limit, 1), _MAX_PAGE), after=after)

    def cancel_training_job(self, tenant: str, job_id: str, *, actor: str = "") -> TrainingJob:
        """For good, whoever runs it. Raises TrainingNotFound, or VersionConflict when it has ended otherwise, or its
        prompt is trained.
        """
        check_text(actor, "actor")
        with storage_errors(), self._changing(tenant):
            return self._training.cancel_job(tenant, job_id, actor=actor)

    def claim_training_job(self, runner: str, *, held: Sequence[str], stale_before: datetime) -> TrainingJob | None:
        """The next job for the server that calls itself `runner`, now `running`; None when there is none.

        `held` are the ids of those that it has in hand. A job whose runner was not heard of since `stale_before` is
        given to another.
        """
        with storage_errors(), self._appending("training"):
            return self._training.claim_job(runner, held=held, stale_before=stale_before)

    def report_training(
        self, job_id: str, runner: str, events: Sequence[TrainingEvent] = (), *, is_trained: bool = False
    ) -> bool:
        """Say that the runner lives, and what the job has to tell; False when the job is not the runner's any more.
        Once it `is_trained` its prompt may be stored: it cannot be cancelled from then on.
        """
        with storage_errors(), self._appending("training"):
            return self._training.report(job_id, runner, _sound(events), is_trained=is_trained)

    def finish_training_job(
        self,
        job_id: str,
        runner: str,
        *,
        status: JobStatus,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        events: Sequence[TrainingEvent] = (),
    ) -> bool:
        """End it; with the status `queued` give it back. False when the job is not the runner's any more."""
        kept = None if result is None else check_metadata(result, _MAX_RESULT_BYTES, "result")
        told = None if error is None else check_metadata(error, _MAX_RESULT_BYTES, "error")
        with storage_errors(), self._appending("training"):
            return self._training.finish(job_id, runner, status=status, result=kept, error=told, events=_sound(events))

    def unfinished_training_jobs(self) -> set[str]:
        """The ids of all tenants' jobs that are queued or running."""
        return self._training.unfinished_ids()

    def count_training_jobs(self) -> dict[str, int]:
        """Jobs of all tenants by status."""
        return self._training.count_jobs()

    def forget_ended_training_jobs(self, *, before: datetime) -> int:
        """Remove jobs that ended before then, with their events; returns how many. Their prompts stay."""
        with storage_errors(), self._appending("training"):
            return self._training.forget_ended_jobs(before=before)

    @property
    def _training(self) -> TrainingRecords:
        return TrainingRecords(self._database)


def _sound(events: Sequence[TrainingEvent]) -> list[TrainingEvent]:
    """Events whose data any database can hold."""
    return [dataclasses.replace(event, data=check_metadata(event.data, _MAX_RESULT_BYTES, "data")) for event in events]
