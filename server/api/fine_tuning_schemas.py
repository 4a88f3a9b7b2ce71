"""What the `/v1/fine_tuning` routes take and answer: OpenAI's shapes, and our own wishes under `promptmux`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

from prompt_store.training_values import JobStatus, TrainingEvent, TrainingJob
from server.errors import InvalidRequestError
from server.runtime.training_specs import MAX_SEED, Hyperparameters, JobRequest

MAX_ID_CHARS = 64
MAX_PAGE = 1000
MAX_METADATA = 16
MAX_TEXT_CHARS = 100_000
EVENT_PREFIX = "ftevent-"
CHECKPOINT_PREFIX = "ftckpt-"
JOB_PREFIX = "ftjob-"

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


# Not a union with "auto", whose errors would name its branches as if they were fields.
_Epochs = Annotated[int, Field(ge=1, le=100_000)]
_BatchSize = Annotated[int, Field(ge=1, le=4096)]
_Multiplier = Annotated[float, Field(gt=0, le=1000)]
_AUTO_EPOCHS = BeforeValidator(_auto_is_none, json_schema_input_type=_Epochs | Literal["auto"] | None)
_AUTO_BATCH_SIZE = BeforeValidator(_auto_is_none, json_schema_input_type=_BatchSize | Literal["auto"] | None)
_AUTO_MULTIPLIER = BeforeValidator(_auto_is_none, json_schema_input_type=_Multiplier | Literal["auto"] | None)


class HyperparametersBody(BaseModel):
    """`auto`, null and nothing are what is usual."""

    model_config = _STRICT

    n_epochs: Annotated[_Epochs | None, _AUTO_EPOCHS] = None
    batch_size: Annotated[_BatchSize | None, _AUTO_BATCH_SIZE] = None
    learning_rate_multiplier: Annotated[_Multiplier | None, _AUTO_MULTIPLIER] = None


class SupervisedBody(BaseModel):
    model_config = _STRICT

    hyperparameters: HyperparametersBody | None = None


class MethodBody(BaseModel):
    model_config = _STRICT

    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class TrainingOptions(BaseModel):
    """How the prompt is made; what is left out is what is usual with the method."""

    model_config = _STRICT

    task: str | None = Field(None, min_length=1, max_length=63, description="The task to be; else `suffix` names it.")
    activate: bool = Field(True, description="Let requests use the new version at once.")
    gate_threshold: float | None = Field(
        None, ge=0, le=1, description="Stay inactive until this share of the validation file is answered as it says."
    )
    method: Literal["prompt_tuning", "prefix_tuning", "p_tuning_v2", "p_tuning", "cartridge"] | None = None
    num_virtual_tokens: int | None = Field(None, ge=1, le=4096)
    init: Literal["random", "vocab", "labels", "text"] | None = None
    init_text: str | None = Field(None, min_length=1, max_length=MAX_TEXT_CHARS)
    encoder_hidden_size: int | None = Field(None, ge=1, le=65_536)
    num_steps: int | None = Field(None, ge=1, le=1_000_000, description="In the place of `n_epochs`.")
    batch_size: int | None = Field(None, ge=1, le=4096)
    learning_rate: float | None = Field(None, gt=0, le=100)
    optimizer: Literal["adamw", "adafactor"] | None = None
    weight_decay: float | None = Field(None, ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] | None = None
    num_warmup_steps: int | None = Field(None, ge=0, le=1_000_000)
    max_grad_norm: float | None = Field(None, gt=0, le=1_000_000)
    eval_every: int | None = Field(None, ge=1, le=1_000_000, description="Steps between two looks at the validation.")
    patience: int | None = Field(None, ge=1, le=1_000_000, description="Such looks without progress that end the job.")
    min_delta: float | None = Field(None, ge=0, le=1000)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)


NOT_OF_CONFIG = frozenset({"task", "activate", "gate_threshold"})


class JobCreate(BaseModel):
    """A prompt that is to be made. OpenAI's `hyperparameters` and `method` are both understood."""

    model_config = ConfigDict(
        **_STRICT,
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "training_file": "file-0123456789abcdef01234567",
                    "suffix": "my-task",
                    "promptmux": {"method": "prompt_tuning", "num_virtual_tokens": 20},
                }
            ]
        },
    )

    model: str = Field(min_length=1, max_length=200, description="The backbone's name.")
    training_file: Id
    validation_file: Id | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64, description="The name of the task to be.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA)
    integrations: list[Any] | None = Field(None, max_length=8, description="None is supported.")
    promptmux: TrainingOptions | None = None

    @field_validator("integrations")
    @classmethod
    def _refuse_integrations(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("not supported")
        return value

    def to_request(self) -> JobRequest:
        """Raises InvalidRequestError when the hyperparameters are given in both places."""
        supervised = self.method.supervised if self.method is not None else None
        of_method = supervised.hyperparameters if supervised is not None else None
        if of_method is not None and self.hyperparameters is not None:
            raise InvalidRequestError(
                "hyperparameters: method has them already; give one of the two.", param="hyperparameters"
            )
        given = (of_method or self.hyperparameters or HyperparametersBody()).model_dump(exclude_none=True)
        own = self.promptmux or TrainingOptions.model_validate({})
        options = own.model_dump(exclude_none=True, exclude=set(NOT_OF_CONFIG))
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            task=own.task,
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=Hyperparameters(**given),
            options=options,
            activate=own.activate,
            gate_threshold=own.gate_threshold,
            metadata=self.metadata,
        )


class JobPage(BaseModel):
    """The query of the list of jobs."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=MAX_PAGE)
    after: str | None = Field(None, max_length=MAX_ID_CHARS, description="The last id of the page before.")


class EventPage(BaseModel):
    """The query of a job's events."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=MAX_PAGE)
    after: str | None = Field(
        None, pattern=rf"^{EVENT_PREFIX}[0-9]{{1,18}}$", description="The last id of the page before."
    )

    @property
    def after_serial(self) -> int | None:
        return None if self.after is None else int(self.after.removeprefix(EVENT_PREFIX))


class CheckpointPage(BaseModel):
    """The query of a job's checkpoints."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(10, ge=1, le=MAX_PAGE)
    after: str | None = Field(None, max_length=MAX_ID_CHARS)


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class HyperparametersObject(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class SupervisedObject(BaseModel):
    hyperparameters: HyperparametersObject


class MethodObject(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedObject


class MadePrompt(BaseModel):
    """The extension: what is being made, and the version that came of it."""

    task: str
    version: int | None
    digest: str | None
    config: dict[str, Any] = Field(description="As the prompt is trained, what is usual filled in.")
    activate: bool
    gate_threshold: float | None


class JobObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None = Field(description="A task that can be called; with its version unless it is active.")
    finished_at: int | None
    hyperparameters: HyperparametersObject
    model: str
    organization_id: str = Field(description="The tenant.")
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None = None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: MethodObject
    promptmux: MadePrompt

    @classmethod
    def of(cls, job: TrainingJob) -> Self:
        spec, result = job.spec, job.result or {}
        config: dict[str, Any] = spec["config"]
        hyperparameters = HyperparametersObject(
            n_epochs=spec["n_epochs"],
            batch_size=config["batch_size"],
            learning_rate_multiplier=spec["learning_rate_multiplier"],
        )
        return cls(
            id=job.id,
            created_at=int(job.created_at.timestamp()),
            error=None if job.error is None else JobError(**job.error),
            fine_tuned_model=result.get("fine_tuned_model"),
            finished_at=None if job.finished_at is None else int(job.finished_at.timestamp()),
            hyperparameters=hyperparameters,
            model=spec["model"],
            organization_id=job.tenant,
            result_files=[],
            seed=config["seed"],
            status=job.status,
            trained_tokens=result.get("trained_tokens"),
            training_file=job.training_file,
            validation_file=job.validation_file,
            integrations=[],
            metadata=spec["metadata"],
            method=MethodObject(supervised=SupervisedObject(hyperparameters=hyperparameters)),
            promptmux=MadePrompt(
                task=job.task,
                version=result.get("version"),
                digest=result.get("digest"),
                config=config,
                activate=spec["activate"],
                gate_threshold=spec["gate_threshold"],
            ),
        )


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] = Field(description="Of metrics: `step`, `total_steps`, `train_loss`, `valid_loss`.")

    @classmethod
    def of(cls, event: TrainingEvent) -> Self:
        return cls(
            id=f"{EVENT_PREFIX}{event.serial}",
            created_at=int(event.at.timestamp()),
            level=event.level,
            message=event.message,
            type=event.type,
            data=dict(event.data),
        )


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None
    valid_loss: float | None


class CheckpointObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int

    @classmethod
    def all_of(cls, job: TrainingJob) -> list[Self]:
        """The one that was kept, the best; none before the job has succeeded."""
        result = job.result
        if result is None or job.finished_at is None:
            return []
        return [
            cls(
                id=CHECKPOINT_PREFIX + job.id.removeprefix(JOB_PREFIX),
                created_at=int(job.finished_at.timestamp()),
                fine_tuned_model_checkpoint=f"{job.task}@{result['version']}",
                fine_tuning_job_id=job.id,
                metrics=CheckpointMetrics(
                    step=result["best_step"],
                    train_loss=result["train_loss"],
                    valid_loss=result["best_loss"] if result["has_validation"] else None,
                ),
                step_number=result["best_step"],
            )
        ]


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool = False
    first_id: str | None
    last_id: str | None
