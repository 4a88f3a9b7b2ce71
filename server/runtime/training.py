"""Fine-tuning as a caller sees it: files of examples, and jobs that make prompts of them.

Owns what a tenant may ask for: sizes, numbers, names; all of it is checked before a job is queued, so that a job that
fails does so for what only training can show. Refuses to know HTTP, and how jobs are run (`training_jobs`). Every
method may block: call it in a thread. All raise the errors of `server.errors`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from prompt_store.errors import TrainingNotFound, VersionConflict
from prompt_store.names import is_name
from prompt_store.store import PromptStore
from prompt_store.training_values import TrainingEvent, TrainingFile, TrainingJob
from server.errors import InvalidRequestError, NotFoundError, PermissionDeniedError
from server.runtime.protocols import BackboneLike
from server.runtime.store_errors import client_errors
from server.runtime.training_specs import JobLimits, JobRequest, choose_task, make_spec
from server.settings import Settings
from server.tenancy.keys import Caller

MAX_FILE_EXAMPLES: Final = 100_000


class TrainingService:
    """Thread-safe. `wake` is called when there may be a job to run, `on_cancel` with the id of a cancelled one;
    `find_fault` says why no prompt can be trained over the backbone, None if one can.
    """

    def __init__(
        self,
        store: PromptStore,
        settings: Settings,
        backbone: BackboneLike,
        *,
        wake: Callable[[], None],
        on_cancel: Callable[[str], None],
        find_fault: Callable[[], str | None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._backbone = backbone
        self._wake = wake
        self._on_cancel = on_cancel
        self._find_fault = find_fault

    # Files

    def add_file(self, caller: Caller, filename: str, data: bytes) -> TrainingFile:
        """Keep a file once every line of it has been read. Raises InvalidRequestError that names the lines."""
        from server.runtime.training_data import count_examples

        num_examples = count_examples(data, filename, self._backbone.tokenizer, max_examples=MAX_FILE_EXAMPLES)
        with client_errors():
            return self._store.add_training_file(
                caller.tenant,
                data,
                filename=filename,
                num_examples=num_examples,
                max_tenant_bytes=self._settings.max_tenant_training_bytes,
                created_by=caller.key_id or "",
            )

    def get_file(self, caller: Caller, file_id: str) -> TrainingFile:
        with client_errors():
            return self._store.get_training_file(caller.tenant, file_id)

    def list_files(
        self, caller: Caller, *, limit: int, after: str | None, newest_first: bool
    ) -> tuple[list[TrainingFile], bool]:
        """Files, and whether there are more."""
        with client_errors():
            found = self._store.list_training_files(
                caller.tenant, limit=limit + 1, after=after, newest_first=newest_first
            )
            return found[:limit], len(found) > limit

    def read_file(self, caller: Caller, file_id: str) -> tuple[TrainingFile, bytes]:
        with client_errors():
            file = self._store.get_training_file(caller.tenant, file_id)
            return file, self._store.read_training_file(file)

    def delete_file(self, caller: Caller, file_id: str) -> None:
        """Raises ConflictError while a job needs it."""
        with client_errors():
            self._store.delete_training_file(caller.tenant, file_id, actor=caller.key_id or "")

    # Jobs

    def create_job(self, caller: Caller, request: JobRequest) -> TrainingJob:
        """Queue a job. Raises InvalidRequestError, NotFoundError for a file, ConflictError for a name that is retired,
        QuotaExceededError for too many jobs.
        """
        self._check_backbone(request.model)
        task, field = choose_task(request)
        if not is_name(task) or task == self._backbone.name:
            raise InvalidRequestError(
                f"{field}: is not the name of a task: 1 to 63 characters of a-z, 0-9, '.', '_' and '-', starting with "
                "a letter or a digit, without '..', and not the backbone's.",
                param=field,
            )
        with client_errors():
            file = self._get_input(caller, request.training_file, "training_file")
            if request.validation_file is not None:
                self._get_input(caller, request.validation_file, "validation_file")
        spec = make_spec(
            request,
            num_examples=file.num_examples,
            limits=JobLimits(
                max_steps=self._settings.max_training_steps,
                max_tokens=min(self._settings.max_training_tokens, self._backbone.max_model_len),
                max_parameters=self._settings.max_training_parameters,
            ),
            shape=self._backbone.shape(self._settings.max_virtual_tokens),
        )
        with client_errors(), _naming_as(field):
            job = self._store.add_training_job(
                caller.tenant,
                task,
                training_file=request.training_file,
                validation_file=request.validation_file,
                spec=spec.to_json(),
                max_unfinished=self._settings.max_tenant_training_jobs,
                created_by=caller.key_id or "",
            )
        self._wake()
        return job

    def get_job(self, caller: Caller, job_id: str) -> TrainingJob:
        with client_errors():
            return self._store.get_training_job(caller.tenant, job_id)

    def list_jobs(self, caller: Caller, *, limit: int, after: str | None) -> tuple[list[TrainingJob], bool]:
        """Jobs, newest first, and whether there are more."""
        with client_errors():
            found = self._store.list_training_jobs(caller.tenant, limit=limit + 1, after=after)
            return found[:limit], len(found) > limit

    def list_events(
        self, caller: Caller, job_id: str, *, limit: int, after: int | None
    ) -> tuple[Sequence[TrainingEvent], bool]:
        """A job's events, newest first, and whether there are more."""
        with client_errors():
            _, found = self._store.list_training_events(caller.tenant, job_id, limit=limit + 1, after=after)
            return found[:limit], len(found) > limit

    def cancel_job(self, caller: Caller, job_id: str) -> TrainingJob:
        """Raises ConflictError for a job that has ended otherwise, or whose prompt is being stored."""
        with client_errors():
            job = self._store.cancel_training_job(caller.tenant, job_id, actor=caller.key_id or "")
        self._on_cancel(job_id)
        return job

    def _get_input(self, caller: Caller, file_id: str, field: str) -> TrainingFile:
        try:
            return self._store.get_training_file(caller.tenant, file_id)
        except TrainingNotFound as error:
            raise NotFoundError(error.message, param=field) from None

    def _check_backbone(self, model: str) -> None:
        if model != self._backbone.name:
            raise InvalidRequestError(
                f"model: a prompt is made for the backbone, {self._backbone.name!r}; name the task to be in `suffix`.",
                param="model",
            )
        if (fault := self._find_fault()) is not None:
            raise InvalidRequestError(f"model: {fault}", param="model", code="training_unsupported")


@contextmanager
def _naming_as(field: str | None) -> Iterator[None]:
    """A task's name that cannot be had is told of by the field that it came in."""
    try:
        yield
    except VersionConflict as error:
        raise VersionConflict(error.message, param=field) from None


def trainable_model(backbone: BackboneLike) -> Any | None:
    """The backbone's own model if prompts can be trained over it: its layers must attend by transformers' interface."""
    return getattr(backbone, "model", None) if backbone.path == "packed" else None


def require_training(service: TrainingService | None) -> TrainingService:
    """Raises PermissionDeniedError where there is none."""
    if service is None:
        raise PermissionDeniedError(
            "This server makes no prompts: its operator has not started it with --allow-training.",
            code="training_disabled",
        )
    return service
