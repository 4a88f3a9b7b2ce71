"""A request for text, turned into rows.

Owns what a request must satisfy before the engine sees it (tokens in the vocabulary, a prompt and its new tokens within
the backbone's length, a budget for the whole request) and how one seed becomes a seed a row. Refuses to know HTTP, JSON
and how rows are run.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from server.engine.request import PromptRef, RowRequest, SamplingParams
from server.errors import ContextLengthExceededError, InvalidRequestError
from server.runtime.tokens import TokenCodec, TooManyTokensError

USUAL_ANSWER_TOKENS = 256
# Log-probabilities of prompt tokens in one answer, alternatives counted: they are kept until all are there, each in
# about a hundred bytes.
MAX_PROMPT_LOGPROBS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What a client asked for, checked field by field, nothing looked up yet.

    `prompts[i]` is text or token ids and is answered by the task that `references[i]` names; the two are as long as
    each other and not empty. `sampling.seed` is the request's seed or None; each row gets one of its own from it.
    With `fills_context`, `sampling.max_tokens` is only a bound: a row may fill what its prompt leaves of the backbone's
    length. `param` is the field of the client's that errors about the prompt name.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    references: tuple[str, ...]
    n: int
    sampling: SamplingParams
    add_special_tokens: bool = True
    fills_context: bool = False
    priority: int = 0
    param: str = "prompt"

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_chars(self) -> int:
        """Characters to tokenise; a text sent to many tasks counts once."""
        return sum(len(text) for text in {prompt for prompt in self.prompts if isinstance(prompt, str)})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationItem:
    """One prompt text with the task that answers it. `text` is None when the client sent token ids."""

    reference: str
    text: str | None
    token_ids: tuple[int, ...]
    prompt: PromptRef | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Rows ready for the engine: row `item * n + j` is sample j of that item.

    With `fills_context` the client set no bound on new tokens: the rows' own is all that there is room for.
    """

    generation_id: str
    tenant: str
    items: tuple[GenerationItem, ...]
    n: int
    rows: tuple[RowRequest, ...]
    fills_context: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """The client's tokens, an item's counted once however many samples it has."""
        return sum(len(item.token_ids) for item in self.items)

    @property
    def num_expected_tokens(self) -> int:
        """New tokens to reckon with beforehand: all that may come; a usual answer where the client set no bound."""
        bounds = (row.sampling.max_tokens for row in self.rows)
        return sum(min(bound, USUAL_ANSWER_TOKENS) if self.fills_context else bound for bound in bounds)

    @property
    def num_virtual_tokens(self) -> int:
        return sum(item.prompt.num_virtual_tokens for item in self.items if item.prompt is not None)

    @property
    def digests(self) -> tuple[str | None, ...]:
        """Distinct digests in order of items; None stands for the bare backbone."""
        return tuple(dict.fromkeys(item.prompt.digest if item.prompt is not None else None for item in self.items))


def derive_seed(seed: int, item: int, sample: int) -> int:
    """The seed of one row: 63 bits of SHA-256 over the request's seed, the item's number and the sample's number.

    Rows of one request differ, and each is the same whenever the request is repeated, whatever else is in the batch.
    """
    digest = hashlib.sha256(f"{seed}:{item}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_budget(spec: GenerationSpec, *, max_tokens: int, max_rows: int) -> None:
    """Raises InvalidRequestError for a request that asks for more than one request may have."""
    num_tokens = spec.num_rows * spec.sampling.max_tokens
    if num_tokens > max_tokens:
        raise InvalidRequestError(
            f"{len(spec.prompts)} prompts × n={spec.n} × max_tokens={spec.sampling.max_tokens} is {num_tokens} new "
            f"tokens; one request may ask for {max_tokens}.",
            param="max_tokens",
        )
    if spec.num_rows > max_rows:
        raise InvalidRequestError(
            f"The request has {spec.num_rows} sequences; one request may have {max_rows}.", param="n"
        )


def tokenize(spec: GenerationSpec, codec: TokenCodec, max_model_len: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of each item. A text that several items share is tokenised once.

    Raises InvalidRequestError, a ContextLengthExceededError early for a text that is far longer than `max_model_len`.
    """
    encoded: dict[str, tuple[int, ...]] = {}
    token_ids: list[tuple[int, ...]] = []
    for index, prompt in enumerate(spec.prompts):
        if not isinstance(prompt, str):
            token_ids.append(prompt)
            continue
        if prompt not in encoded:
            encoded[prompt] = encode_prompt(
                prompt,
                codec,
                add_special_tokens=spec.add_special_tokens,
                max_model_len=max_model_len,
                param=spec.param if len(spec.prompts) == 1 else f"{spec.param}.{index}",
            )
        token_ids.append(encoded[prompt])
    return tuple(token_ids)


def encode_prompt(
    text: str, codec: TokenCodec, *, add_special_tokens: bool, max_model_len: int, param: str
) -> tuple[int, ...]:
    """The tokens of a text that the backbone is to read. Raises InvalidRequestError, naming `param`."""
    try:
        token_ids = codec.encode_within(text, add_special_tokens=add_special_tokens, max_tokens=max_model_len)
    except TooManyTokensError as error:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested at least "
            f"{error.at_least} tokens in the prompt. Please reduce the length of the prompt.",
            param=param,
        ) from None
    check_encoded(token_ids, codec.vocab_size, param)
    return token_ids


def check_encoded(token_ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    """Raises InvalidRequestError unless the backbone can take what its tokenizer made of a text."""
    if not token_ids:
        raise InvalidRequestError("The prompt has no tokens.", param=param)
    # A tokenizer may know added tokens for which the backbone has no embedding.
    if (largest := max(token_ids)) >= vocab_size:
        raise InvalidRequestError(
            f"The prompt has the token {largest}; the backbone has embeddings for 0 to {vocab_size - 1}.", param=param
        )


def make_generation(
    spec: GenerationSpec,
    *,
    generation_id: str,
    tenant: str,
    token_ids: Sequence[tuple[int, ...]],
    prompts: Mapping[str, PromptRef | None],
    max_model_len: int,
) -> Generation:
    """Rows of `spec`. `prompts` holds what each reference resolved to.

    Raises ContextLengthExceededError when an item, its virtual tokens and its new tokens do not fit together, and
    InvalidRequestError for too many log-probabilities.
    """
    _check_prompt_logprobs(spec, sum(map(len, token_ids)))
    base_seed = spec.sampling.seed if spec.sampling.seed is not None else secrets.randbits(63)
    items: list[GenerationItem] = []
    rows: list[RowRequest] = []
    for index, (prompt, reference, ids) in enumerate(zip(spec.prompts, spec.references, token_ids, strict=True)):
        ref = prompts[reference]
        sampling = _fit(spec, len(ids), ref.num_virtual_tokens if ref else 0, max_model_len)
        text = prompt if isinstance(prompt, str) else None
        items.append(GenerationItem(reference=reference, text=text, token_ids=ids, prompt=ref))
        for sample in range(spec.n):
            rows.append(
                RowRequest(
                    row_id=f"{generation_id}-{index * spec.n + sample}",
                    tenant=tenant,
                    token_ids=ids,
                    prompt=ref,
                    sampling=replace(sampling, seed=derive_seed(base_seed, index, sample)),
                    priority=spec.priority,
                )
            )
    return Generation(
        generation_id=generation_id,
        tenant=tenant,
        items=tuple(items),
        n=spec.n,
        rows=tuple(rows),
        fills_context=spec.fills_context,
    )


def _check_prompt_logprobs(spec: GenerationSpec, num_tokens: int) -> None:
    if spec.sampling.prompt_logprobs is None:
        return
    num_asked = num_tokens * spec.n * (spec.sampling.prompt_logprobs + 1)
    if num_asked > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"{num_tokens} prompt tokens × n={spec.n} × (logprobs={spec.sampling.prompt_logprobs} + 1) are {num_asked} "
            f"log-probabilities; one request may ask for {MAX_PROMPT_LOGPROBS}.",
            param="logprobs",
        )


def _fit(spec: GenerationSpec, num_tokens: int, num_virtual_tokens: int, max_model_len: int) -> SamplingParams:
    """The sampling of an item of so many tokens. Raises ContextLengthExceededError when it does not fit."""
    sampling = spec.sampling
    num_needed = sampling.max_tokens
    if spec.fills_context:
        num_left = max(max_model_len - num_tokens - num_virtual_tokens, 1)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, num_left))
        num_needed = max(sampling.max_tokens, sampling.min_tokens)
    check_length(num_tokens, num_virtual_tokens, num_needed, max_model_len, spec.param)
    return sampling


def check_length(
    num_tokens: int, num_virtual_tokens: int, max_tokens: int, max_model_len: int, param: str = "prompt"
) -> None:
    """Raises ContextLengthExceededError unless all of it fits; `param` names the field that the tokens came from."""
    total = num_tokens + num_virtual_tokens + max_tokens
    if total <= max_model_len:
        return
    virtual = f", {num_virtual_tokens} virtual" if num_virtual_tokens else ""
    fits_alone = num_tokens + num_virtual_tokens < max_model_len
    raise ContextLengthExceededError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {total} tokens "
        f"({num_tokens} in the prompt{virtual}, {max_tokens} in the completion). Please reduce the length of the "
        "prompt or completion.",
        param="max_tokens" if fits_alone else param,
    )
