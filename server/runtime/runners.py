"""What a server does beside requests once it is ready: it checks gates and, where that is allowed, makes prompts.

The only place that decides whether training's modules, which import torch and `tuning`, are imported at all.
"""

from typing import TYPE_CHECKING

from server.runtime.gates import GateRunner
from server.runtime.parts import StartError
from server.runtime.protocols import BackgroundRunner
from server.runtime.training import TrainingService, trainable_model
from server.settings import Settings

if TYPE_CHECKING:
    from server.runtime.service import Runtime
    from server.runtime.training_jobs import JobRunner


def check_can_train(settings: Settings) -> None:
    """Import what training needs, if it is allowed; takes a second. Raises StartError when something is missing."""
    if settings.allow_training == "on":
        try:
            import server.runtime.training_jobs  # noqa: F401
        except ImportError as error:
            raise StartError(
                f"--allow-training needs {error.name or 'packages'} that are not installed: "
                "pip install 'promptmux[train]'"
            ) from error


def start_runners(runtime: "Runtime") -> tuple[TrainingService | None, list[BackgroundRunner]]:
    """Begin all of it; returns what callers see of training, None where it is not allowed. The event loop's thread
    alone may call this.
    """
    gates = GateRunner(runtime)
    gates.start()
    service, jobs = _start_training(runtime)
    return service, [gates] if jobs is None else [gates, jobs]


def _start_training(runtime: "Runtime") -> "tuple[TrainingService | None, JobRunner | None]":
    """No runner where no prompt can be trained over the backbone, which whoever asks for a job is told."""
    if runtime.settings.allow_training != "on":
        return None, None
    from server.runtime.training_jobs import JobRunner

    parts = runtime.parts
    model = trainable_model(parts.backbone)
    if model is None:
        fault = f"{parts.backbone.name} is served on the {parts.backbone.path} path; no prompt can be trained over it"
        service = TrainingService(
            runtime.store,
            runtime.settings,
            parts.backbone,
            wake=lambda: None,
            on_cancel=lambda job_id: None,
            find_fault=lambda: fault,
        )
        return service, None
    runner = JobRunner(runtime, model, parts.engine.set_background)
    service = TrainingService(
        runtime.store,
        runtime.settings,
        parts.backbone,
        wake=runner.wake,
        on_cancel=runner.cancel,
        find_fault=lambda: runner.fault,
    )
    runner.start()
    return service, runner
