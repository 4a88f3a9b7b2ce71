"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the backbone's tokenizer, in vLLM's shapes.

Long texts are handled in threads, the answer's JSON included: it is as long as they are.
"""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.responses import Response

from server import errors
from server.api.chat_input import num_chars, to_messages
from server.api.chat_schemas import MAX_MESSAGES, ChatMessage
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.generation_response import dump_json
from server.api.sampling_input import check_reference, check_unicode, check_vocabulary, value_or
from server.api.strict_json import StrictJSONRoute
from server.errors import InvalidRequestError
from server.runtime.chat_template import ChatTemplate
from server.runtime.service import Runtime
from server.runtime.tokens import CHARS_PER_TOKEN, TokenCodec
from server.tenancy.keys import Caller

MAX_DETOKENIZE_IDS = 1 << 18
# Or as many as are looked at of a prompt before it is refused as too long, where that is more.
MAX_TOKENIZE_CHARS = 1 << 18

router = APIRouter(route_class=StrictJSONRoute, tags=["tokenizer"])

_REFUSALS = documented_errors(
    errors.InvalidRequestError, errors.TaskNotFoundError, errors.PayloadTooLargeError, errors.RequestTimeoutError
)
_MODEL = Field(None, description="Checked if given; every task has the backbone's tokenizer.")


class TokenizeRequest(BaseModel):
    """Either `prompt` or `messages`. Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"prompt": "France"}, {"messages": [{"role": "user", "content": "France"}]}],
        },
    )

    model: str | None = _MODEL
    prompt: str | None = Field(
        None,
        description=f"May be empty. At most {MAX_TOKENIZE_CHARS} characters, or {CHARS_PER_TOKEN} a token of "
        "`max_model_len` where that is more; so have messages, as the chat template writes them.",
    )
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Default true. Only with `messages`.")
    return_token_strs: bool | None = Field(None, description="The vocabulary's names of the tokens as well.")


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


TokensField = Annotated[
    Any, WithJsonSchema({"type": "array", "maxItems": MAX_DETOKENIZE_IDS, "items": {"type": "integer", "minimum": 0}})
]


class DetokenizeRequest(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"tokens": [1, 2, 3]}]})

    model: str | None = _MODEL
    tokens: TokensField = Field(description="Token ids; special ones are written by their names.")


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None = Field(description="Null where the backbone has none.")
    vocab_size: int = Field(description="Ids of `prompt` must be lower.")
    model_max_length: int = Field(description="Virtual, prompt and new tokens together.")


@router.post("/tokenize", response_model=TokenizeResponse, summary="Text to token ids", responses=_REFUSALS)
async def tokenize(body: TokenizeRequest, runtime: ReadyRuntime, caller: CurrentCaller) -> Response:
    """Virtual tokens have no ids and are not among them."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt: give either prompt or messages", param="prompt")
    await _check_model(body.model, runtime, caller)
    encode = _Encode(
        runtime.parts.codec,
        max_model_len=runtime.parts.backbone.max_model_len,
        add_special_tokens=value_or(body.add_special_tokens, body.messages is None),
        names_tokens=bool(body.return_token_strs),
    )
    if body.messages is not None:
        template = runtime.parts.require_chat_template()
        messages = to_messages(body.messages)
        answer = await runtime.run_tokenizer(
            num_chars(messages), encode.messages, messages, template, value_or(body.add_generation_prompt, True)
        )
    else:
        assert body.prompt is not None
        if body.add_generation_prompt is not None:
            raise InvalidRequestError("add_generation_prompt: only with messages", param="add_generation_prompt")
        text = check_unicode(body.prompt, "prompt")
        answer = await runtime.run_tokenizer(len(text), encode.text, text, "prompt")
    return Response(answer, media_type="application/json")


@router.post("/detokenize", response_model=DetokenizeResponse, summary="Token ids to text", responses=_REFUSALS)
async def detokenize(body: DetokenizeRequest, runtime: ReadyRuntime, caller: CurrentCaller) -> Response:
    if not isinstance(body.tokens, list):
        raise InvalidRequestError("tokens: must be a list of token ids", param="tokens")
    if len(body.tokens) > MAX_DETOKENIZE_IDS:
        raise InvalidRequestError(f"tokens: at most {MAX_DETOKENIZE_IDS}, got {len(body.tokens)}", param="tokens")
    await _check_model(body.model, runtime, caller)
    codec, vocab_size = runtime.parts.codec, runtime.parts.backbone.vocab_size

    def decode() -> bytes:
        return dump_json({"prompt": codec.decode(check_vocabulary(body.tokens, "tokens", vocab_size))})

    return Response(await runtime.run_tokenizer(len(body.tokens), decode), media_type="application/json")


@router.get("/tokenizer_info", summary="The backbone's tokenizer", responses=documented_errors())
async def tokenizer_info(runtime: ReadyRuntime, caller: CurrentCaller) -> TokenizerInfo:
    """What a client needs to use the server's tokenizer from afar."""
    backbone, template = runtime.parts.backbone, runtime.parts.chat_template
    special = runtime.parts.codec.special_tokens()
    return TokenizerInfo(
        tokenizer_class=type(backbone.tokenizer).__name__,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=template.source if template is not None else None,
        vocab_size=backbone.vocab_size,
        model_max_length=backbone.max_model_len,
    )


class _Encode:
    """The work of one request, for a thread: text in, the answer's bytes out."""

    def __init__(self, codec: TokenCodec, *, max_model_len: int, add_special_tokens: bool, names_tokens: bool) -> None:
        self._codec = codec
        self._max_model_len = max_model_len
        self._max_chars = max(MAX_TOKENIZE_CHARS, max_model_len * CHARS_PER_TOKEN)
        self._add_special_tokens = add_special_tokens
        self._names_tokens = names_tokens

    def messages(self, messages: list[dict[str, str]], template: ChatTemplate, add_generation_prompt: bool) -> bytes:
        text = template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.text(text, "messages")

    def text(self, text: str, param: str) -> bytes:
        if len(text) > self._max_chars:
            raise InvalidRequestError(
                f"{param}: at most {self._max_chars} characters are tokenised, got {len(text)}", param=param
            )
        ids = self._codec.encode(text, add_special_tokens=self._add_special_tokens)
        return dump_json(
            {
                "count": len(ids),
                "max_model_len": self._max_model_len,
                "tokens": ids,
                "token_strs": self._codec.names(ids) if self._names_tokens else None,
            }
        )


async def _check_model(model: str | None, runtime: Runtime, caller: Caller) -> None:
    """Raises TaskNotFoundError for a model that the caller cannot call."""
    if model is not None:
        await runtime.resolve(caller, check_reference(model, "model"))
