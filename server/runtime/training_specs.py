"""What a training job asks for: OpenAI's hyperparameters and our own, made into one checked configuration.

Owns what "auto" means and which of two ways to say the same thing wins. Refuses to know HTTP, files and how a prompt
is trained. What the store keeps of a job's wishes is made and read here.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from prompt_store.manifest import BackboneShape
from server.errors import InvalidRequestError
from tuning.config import ConfigError, TrainConfig, make_train_config

Auto = Literal["auto"]

MAX_SEED: Final = 2**31 - 1
USUAL_BATCH_SIZE: Final = 16
_USUAL_VIRTUAL_TOKENS: Final[int] = TrainConfig.model_fields["num_virtual_tokens"].default
# A prompt needs steps, not epochs: few examples are gone through more often (Lester et al. 2021 train for 30,000 steps;
# on small backbones the loss is flat after a few hundred).
USUAL_STEPS: Final = (150, 1000)
USUAL_EPOCHS: Final = 3
# Validation, and with it the choice of the best prompt, happens so many times a job.
NUM_EVALUATIONS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """As OpenAI's clients give them."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job as a client asks for it. `options` are fields of TrainConfig."""

    model: str
    training_file: str
    validation_file: str | None = None
    task: str | None = None
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    options: Mapping[str, Any] = field(default_factory=dict)
    activate: bool = True
    gate_threshold: float | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What the store keeps: enough to run the job, and to say of it what its client wants to read."""

    model: str
    config: TrainConfig
    n_epochs: int
    activate: bool
    gate_threshold: float | None
    metadata: Mapping[str, str] | None
    learning_rate_multiplier: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"config": self.config.model_dump()}


def read_spec(kept: Mapping[str, Any]) -> JobSpec:
    """What `to_json` gave. Raises ConfigError when it is of a release whose configuration was another."""
    return JobSpec(**{**kept, "config": make_train_config(kept["config"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """What the server's settings allow one job."""

    max_steps: int
    max_tokens: int
    max_parameters: int


def make_spec(request: JobRequest, *, num_examples: int, limits: JobLimits, shape: BackboneShape) -> JobSpec:
    """A request's configuration, for a backbone of this shape. Raises InvalidRequestError naming the field."""
    max_steps = limits.max_steps
    given, wishes = request.hyperparameters, dict(request.options)
    batch_size = _choose(wishes, "batch_size", given.batch_size)
    if batch_size is None:
        batch_size = min(USUAL_BATCH_SIZE, num_examples)
    steps_an_epoch = max(1, math.ceil(num_examples / batch_size))
    num_steps = wishes.pop("num_steps", None)
    if num_steps is not None and given.n_epochs != "auto":
        raise InvalidRequestError(
            "promptmux.num_steps: n_epochs says how long to train already; give one of them.",
            param="promptmux.num_steps",
        )
    if num_steps is None:
        if given.n_epochs == "auto":
            least, most = USUAL_STEPS
            num_steps = min(max(least, steps_an_epoch * USUAL_EPOCHS), most, max_steps)
        else:
            num_steps = given.n_epochs * steps_an_epoch
    if num_steps > max_steps:
        raise InvalidRequestError(
            f"The job would take {num_steps} steps; this server allows {max_steps}.",
            param="promptmux.num_steps" if "num_steps" in request.options else "hyperparameters.n_epochs",
        )
    wishes |= {"batch_size": batch_size, "num_steps": num_steps}
    wishes["seed"] = _seed(request, wishes)
    if request.validation_file is None:
        for name in ("eval_every", "patience"):
            if wishes.get(name) is not None:
                raise InvalidRequestError(f"promptmux.{name}: needs a validation_file.", param=f"promptmux.{name}")
    elif wishes.get("eval_every") is None:
        wishes["eval_every"] = max(1, num_steps // NUM_EVALUATIONS)
    multiplier = 1.0
    if given.learning_rate_multiplier != "auto":
        if wishes.get("learning_rate") is not None:
            raise InvalidRequestError(
                "promptmux.learning_rate: learning_rate_multiplier says how fast to learn already; give one of them.",
                param="promptmux.learning_rate",
            )
        multiplier = given.learning_rate_multiplier
    if wishes.get("num_virtual_tokens") is None:
        # Whoever wishes for none in particular is not to hear that the usual number is too large.
        wishes["num_virtual_tokens"] = min(_USUAL_VIRTUAL_TOKENS, shape.max_virtual_tokens, limits.max_tokens // 2)
    config = _make_config(wishes)
    if multiplier != 1.0:
        config = _make_config(wishes | {"learning_rate": config.usual_learning_rate * multiplier})
    _check_size(config, limits, shape)
    if request.gate_threshold is not None and request.validation_file is None:
        raise InvalidRequestError(
            "promptmux.gate_threshold: needs a validation_file, whose examples the gate asks.",
            param="promptmux.gate_threshold",
        )
    return JobSpec(
        model=request.model,
        config=config,
        n_epochs=max(1, round(num_steps / steps_an_epoch)),
        activate=request.activate,
        gate_threshold=request.gate_threshold,
        metadata=None if request.metadata is None else dict(request.metadata),
        learning_rate_multiplier=multiplier,
    )


def num_parameters(config: TrainConfig, shape: BackboneShape) -> int:
    """How many numbers are trained, PEFT's encoders included. Raises InvalidRequestError for a method that a backbone
    of this shape does not take.
    """
    k = config.num_virtual_tokens
    if config.method in ("prompt_tuning", "p_tuning"):
        width, output = shape.hidden_size, shape.hidden_size
    elif shape.kv_heads is None or shape.head_dim is None:
        raise InvalidRequestError(
            f"promptmux.method: {shape.name}'s layers differ in their keys and values, so that it takes no prefix; use "
            "prompt_tuning or p_tuning.",
            param="promptmux.method",
        )
    else:
        width = shape.kv_heads * shape.head_dim
        output = shape.num_layers * 2 * width
    if config.method not in ("p_tuning", "prefix_tuning"):
        return k * output
    hidden = config.encoder_hidden_size or width
    inner = hidden * hidden + hidden if config.method == "p_tuning" else 0
    return k * width + width * hidden + hidden + inner + hidden * output + output


def choose_task(request: JobRequest) -> tuple[str, str | None]:
    """The name that the prompt will be called by, and the field that it comes from; a new one if none was given."""
    if request.task is not None:
        if request.suffix is not None and request.suffix != request.task:
            raise InvalidRequestError(
                "suffix: promptmux.task names the task already; give one of them.", param="suffix"
            )
        return request.task, "promptmux.task"
    if request.suffix is not None:
        return request.suffix, "suffix"
    return f"ft-{secrets.token_hex(4)}", None


def _check_size(config: TrainConfig, limits: JobLimits, shape: BackboneShape) -> None:
    """Of all that a job's memory grows with; examples are measured when they are read."""
    most = min(shape.max_virtual_tokens, limits.max_tokens - 2)
    if config.num_virtual_tokens > most:
        raise InvalidRequestError(
            f"promptmux.num_virtual_tokens: this server takes prompts of at most {most}.",
            param="promptmux.num_virtual_tokens",
        )
    found = num_parameters(config, shape)
    if found > limits.max_parameters:
        has_encoder = config.method in ("p_tuning", "prefix_tuning")
        field_name = "encoder_hidden_size" if has_encoder else "num_virtual_tokens"
        raise InvalidRequestError(
            f"promptmux.{field_name}: {found} numbers would be trained, encoder included; this server allows "
            f"{limits.max_parameters}.",
            param=f"promptmux.{field_name}",
        )


def _choose(wishes: dict[str, Any], name: str, given: int | Auto) -> int | None:
    own = wishes.pop(name, None)
    if own is not None and given != "auto":
        raise InvalidRequestError(
            f"promptmux.{name}: the hyperparameters have {name} already; give one of them.", param=f"promptmux.{name}"
        )
    if own is not None:
        return int(own)
    return None if given == "auto" else given


def _seed(request: JobRequest, wishes: Mapping[str, Any]) -> int:
    own: int | None = wishes.get("seed")
    if own is not None and request.seed is not None and own != request.seed:
        raise InvalidRequestError("promptmux.seed: seed says otherwise; give one of them.", param="promptmux.seed")
    if own is not None:
        return own
    return request.seed if request.seed is not None else secrets.randbelow(MAX_SEED + 1)


def _make_config(values: dict[str, Any]) -> TrainConfig:
    try:
        return make_train_config(values)
    except ConfigError as error:
        param = "promptmux" if error.field is None else f"promptmux.{error.field}"
        message = str(error)
        raise InvalidRequestError(f"promptmux.{message}" if error.field else message, param=param) from None
