"""How a job leaves its runner, and what its tenant is told of why it failed.

A failure that is the tenant's to know names a field; any other says that the server's log has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prompt_store.training_values import JobStatus
from server.errors import InvalidRequestError, PromptmuxError
from server.runtime.training_work import TrainingFailedError
from tuning.records import TrainTaskError, UnsupportedBackboneError


@dataclass(frozen=True, slots=True)
class Ending:
    """`queued` gives the job back."""

    status: JobStatus
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


def failed(error: PromptmuxError) -> Ending:
    return Ending("failed", error={"code": error.code, "message": error.message, "param": error.param})


def failed_in_training(error: Exception) -> Ending:
    """As far as it is the client's to know."""
    return failed(_to_client_error(error))


def _to_client_error(error: Exception) -> PromptmuxError:
    if isinstance(error, TrainTaskError):
        return InvalidRequestError(str(error), param=f"promptmux.{error.field}", code="invalid_training_task")
    if isinstance(error, UnsupportedBackboneError):
        return InvalidRequestError(str(error), param="model", code="training_unsupported")
    if isinstance(error, TrainingFailedError):
        return InvalidRequestError(str(error), code="training_failed")
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return InvalidRequestError(
            "The device has no memory left for this job; a smaller prompt or shorter examples need less.",
            code="out_of_memory",
        )
    return PromptmuxError("The server failed while it trained; its log says why.")
