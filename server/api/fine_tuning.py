"""`/v1/fine_tuning/jobs`: have prompts made on the server, as OpenAI's clients fine-tune models."""

from typing import Annotated

from fastapi import APIRouter, Query

from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.fine_tuning_schemas import (
    CheckpointList,
    CheckpointObject,
    CheckpointPage,
    EventList,
    EventObject,
    EventPage,
    JobCreate,
    JobList,
    JobObject,
    JobPage,
)
from server.api.strict_json import StrictJSONRoute

router = APIRouter(route_class=StrictJSONRoute, tags=["training"])


@router.post(
    "/v1/fine_tuning/jobs",
    summary="Make a prompt",
    responses=documented_errors(
        errors.InvalidRequestError,
        errors.NotFoundError,
        errors.ConflictError,
        errors.QuotaExceededError,
        errors.StorageFullError,
        errors.UnavailableError,
    ),
)
async def create_job(body: JobCreate, runtime: ReadyRuntime, caller: CurrentCaller) -> JobObject:
    """Queues a job; it trains in the gaps that requests leave, and goes on after a restart of the server."""
    return JobObject.of(await runtime.call(runtime.training.create_job, caller, body.to_request()))


@router.get(
    "/v1/fine_tuning/jobs",
    summary="List jobs",
    responses=documented_errors(errors.InvalidRequestError, errors.NotFoundError),
)
async def list_jobs(page: Annotated[JobPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller) -> JobList:
    """The tenant's own, newest first. Ended ones are kept for 90 days."""
    jobs, has_more = await runtime.call(runtime.training.list_jobs, caller, limit=page.limit, after=page.after)
    return JobList(data=[JobObject.of(job) for job in jobs], has_more=has_more)


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}", summary="One job", responses=documented_errors(errors.NotFoundError)
)
async def get_job(fine_tuning_job_id: str, runtime: ReadyRuntime, caller: CurrentCaller) -> JobObject:
    return JobObject.of(await runtime.call(runtime.training.get_job, caller, fine_tuning_job_id))


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    summary="What a job tells",
    responses=documented_errors(errors.InvalidRequestError, errors.NotFoundError),
)
async def list_events(
    fine_tuning_job_id: str, page: Annotated[EventPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller
) -> EventList:
    """Newest first."""
    events, has_more = await runtime.call(
        runtime.training.list_events, caller, fine_tuning_job_id, limit=page.limit, after=page.after_serial
    )
    return EventList(data=[EventObject.of(event) for event in events], has_more=has_more)


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints",
    summary="A job's best step",
    responses=documented_errors(errors.InvalidRequestError, errors.NotFoundError),
)
async def list_checkpoints(
    fine_tuning_job_id: str, page: Annotated[CheckpointPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller
) -> CheckpointList:
    """The step whose prompt was kept, once the job has succeeded."""
    job = await runtime.call(runtime.training.get_job, caller, fine_tuning_job_id)
    # There is one: whoever has seen it has seen all.
    found = CheckpointObject.all_of(job) if page.after is None else []
    return CheckpointList(data=found, first_id=found[0].id if found else None, last_id=found[-1].id if found else None)


@router.post(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel",
    summary="Cancel a job",
    responses=documented_errors(errors.NotFoundError, errors.ConflictError),
)
async def cancel_job(fine_tuning_job_id: str, runtime: ReadyRuntime, caller: CurrentCaller) -> JobObject:
    """For good: no prompt comes of it. 409 for a job that has ended otherwise, or whose prompt is being stored."""
    return JobObject.of(await runtime.call(runtime.training.cancel_job, caller, fine_tuning_job_id))
