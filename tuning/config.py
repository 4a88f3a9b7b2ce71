"""How one prompt is trained, and how a run of many is: frozen values, every one bounded, checked when they are made.

Owns the names of the methods and of their beginnings, and what is usual for each. Refuses to know data, tensors, and
where a value came from (a flag, a file, a request): all of them pass through here.
"""

from types import MappingProxyType
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Method = Literal["prompt_tuning", "prefix_tuning", "p_tuning_v2", "p_tuning", "cartridge"]
Init = Literal["random", "vocab", "labels", "text"]
OptimizerName = Literal["adamw", "adafactor"]
ScheduleName = Literal["constant", "linear", "cosine"]

MAX_VIRTUAL_TOKENS: Final = 4096
MAX_STEPS: Final = 1_000_000
MAX_TEXT_CHARS: Final = 1_000_000
MAX_SEED: Final = 2**31 - 1

# The beginnings that a method can have; the first is the usual one. Prompts of the vocabulary's kind start where the
# backbone has been before (Lester et al. 2021, figure 3b). The encoders of prefix tuning and P-tuning have no such
# place: their weights start at random, as in the papers.
INITS: Final = MappingProxyType[Method, tuple[Init, ...]](
    {
        "prompt_tuning": ("vocab", "random", "labels", "text"),
        "prefix_tuning": ("random",),
        "p_tuning_v2": ("text", "random", "vocab", "labels"),
        "p_tuning": ("random",),
        "cartridge": ("text", "random"),
    }
)
# Of AdamW, for a prompt in fp32 over a frozen backbone; for Adafactor with a fixed learning rate they do as well.
LEARNING_RATES: Final = MappingProxyType[Method, float](
    {
        "prompt_tuning": 0.03,
        "prefix_tuning": 0.001,
        "p_tuning_v2": 0.01,
        "p_tuning": 0.001,
        "cartridge": 0.01,
    }
)


class ConfigError(ValueError):
    """A value of a configuration is out of bounds, unknown, or contradicts another; `field` names it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TrainConfig(BaseModel):
    """How one prompt is trained. None stands for what is usual with the method (`usual_init`, `usual_learning_rate`).

    `init_text` is the text of the beginning 'text': its first tokens, or the document that a cartridge holds; None: the
    training examples themselves. `encoder_hidden_size` is the width of prefix tuning's MLP or of P-tuning's encoder;
    None: as PEFT chooses it. `eval_every` counts steps, None: ten times in all; `patience` counts evaluations that do
    not lower the validation loss by `min_delta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: Method = "prompt_tuning"
    num_virtual_tokens: int = Field(default=20, ge=1, le=MAX_VIRTUAL_TOKENS)
    init: Init | None = None
    init_text: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT_CHARS)
    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65_536)
    num_steps: int = Field(ge=1, le=MAX_STEPS)
    batch_size: int = Field(default=16, ge=1, le=4096)
    learning_rate: float | None = Field(default=None, gt=0, le=100)
    optimizer: OptimizerName = "adamw"
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    schedule: ScheduleName = "linear"
    num_warmup_steps: int = Field(default=10, ge=0, le=MAX_STEPS)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1_000_000)
    eval_every: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    patience: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    min_delta: float = Field(default=0.0, ge=0, le=1000)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.init is not None and self.init not in INITS[self.method]:
            raise ValueError(f"init: {self.method} starts from {' or '.join(INITS[self.method])}, not {self.init}")
        if self.init_text is not None and self.usual_init != "text":
            raise ValueError(f"init_text: is for init 'text'; this prompt starts from '{self.usual_init}'")
        if self.encoder_hidden_size is not None and self.method not in ("prefix_tuning", "p_tuning"):
            raise ValueError(f"encoder_hidden_size: {self.method} has no encoder")
        return self

    @property
    def usual_init(self) -> Init:
        """`init`, or the method's usual one."""
        return INITS[self.method][0] if self.init is None else self.init

    @property
    def usual_learning_rate(self) -> float:
        """`learning_rate`, or the method's usual one."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


class RunConfig(BaseModel):
    """How a run of many prompts uses the machine. None of it changes a result, but by rounding.

    `max_tokens_per_pass` bounds one forward pass; a larger batch is cut into several, whose gradients are added.
    `checkpoint_every` counts steps between states that a killed run goes on from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens_per_pass: int = Field(default=2048, ge=1, le=10_000_000)
    activation_checkpointing: bool = False
    max_tasks_at_once: int = Field(default=16, ge=1, le=4096)
    checkpoint_every: int = Field(default=50, ge=1, le=MAX_STEPS)


def make_train_config(values: dict[str, Any]) -> TrainConfig:
    """A configuration from somebody's values. Raises ConfigError naming the field and what it must be."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise _to_config_error(error, TrainConfig) from None


def make_run_config(values: dict[str, Any]) -> RunConfig:
    """A configuration from somebody's values. Raises ConfigError naming the field and what it must be."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _to_config_error(error, RunConfig) from None


def _to_config_error(error: ValidationError, kind: type[BaseModel]) -> ConfigError:
    """The first of pydantic's complaints in one line."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        # A contradiction between fields: the message begins with the field that is to change.
        return ConfigError(message, field=message.partition(":")[0])
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{field}: is not known; there are {', '.join(kind.model_fields)}", field=field)
    return ConfigError(f"{field}: {message[:1].lower()}{message[1:]}", field=field)
