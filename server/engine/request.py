"""What goes into the engine and what comes out of it: plain values, no tensors, no HTTP.

A request of the API becomes one or more `RowRequest`s (one a sequence). The engine answers with `RowOutput`s: at most
one a row a step, handed over in one batch a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.errors import ContextLengthExceededError, PromptmuxError

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_CANCELLED = "cancelled"
FINISH_ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one row's tokens are chosen and when it ends. Ranges are checked by the API before they get here.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1.0, `min_p` 0.0 and `repetition_penalty` 1.0 are off.
    `logprobs` is the number of alternatives reported a generated token (0: the chosen token alone; None: off), and
    `prompt_logprobs` likewise for the client's own tokens (used by `echo`).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRef:
    """The one immutable prompt version that a row holds from admission to its end.

    `digest` is the SHA-256 (hex) of the uploaded file and is what clients see. `prefix_key` names what is resident on
    the device: the digest together with how the file is read (kind, task index), so that one file read in two ways
    never shares a prefix. `kind` is "embeddings" or "prefix".
    """

    tenant: str
    task: str
    version: int
    digest: str
    prefix_key: str
    kind: str
    num_virtual_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """One sequence to generate. `row_id` is unique among all rows of the server's life.

    `token_ids` are the client's tokens (no virtual ones), at least one. `prompt` is None for the bare backbone.
    `priority` orders the rows of one tenant that wait: lower is sooner.
    """

    row_id: str
    tenant: str
    token_ids: tuple[int, ...]
    prompt: PromptRef | None
    sampling: SamplingParams
    priority: int = 0

    def require_length(self, max_model_len: int) -> None:
        """Raises ContextLengthExceededError when virtual, client and new tokens together are more than allowed."""
        k = self.prompt.num_virtual_tokens if self.prompt is not None else 0
        if k + len(self.token_ids) + self.sampling.max_tokens > max_model_len:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {max_model_len} tokens: {k} virtual, {len(self.token_ids)} "
                f"prompt and {self.sampling.max_tokens} new tokens are more."
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability (natural log, finite) and its best alternatives, likeliest first.

    The chosen token is always among `top` when `top` is not empty, with the same float.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutput:
    """What a step added to one row.

    `text` is final: bytes that may still change (half a UTF-8 character, the beginning of a stop string) are held
    back until a later output. `token_ids` and `logprobs` are aligned; a token's entry is delivered in the step that
    made it, also when its text is still held back, so the two may run apart inside a stream and agree at its end.
    `prompt_logprobs` comes once, with the row's first output, and has one entry a client token; entry 0 is None.
    `stop_reason` is the stop string or stop token id that ended the row, None for EOS or length.
    `queue_s` comes with the row's first token: the seconds from submission to admission. So does `num_cached`: how
    many of the client's tokens were not computed because their keys and values were kept from earlier rows.
    With `error` set the row has ended and no token of that step is delivered.
    """

    row_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: PromptmuxError | None = None
    queue_s: float | None = None
    num_cached: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
