"""Requests turned into rows: lengths, seeds, and what is counted once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import PromptRef, SamplingParams
from server.errors import ContextLengthExceededError, InvalidRequestError
from server.runtime.generation import (
    MAX_PROMPT_LOGPROBS,
    USUAL_ANSWER_TOKENS,
    GenerationSpec,
    check_length,
    derive_seed,
    make_generation,
    tokenize,
)
from server.runtime.tokens import TokenCodec
from tests.fakes import VOCAB_SIZE, ByteTokenizer


def make_ref(task: str = "t", num_virtual_tokens: int = 4) -> PromptRef:
    return PromptRef(
        tenant="default", task=task, version=1, digest="d" * 64, prefix_key=f"{task}-key", kind="embeddings",
        num_virtual_tokens=num_virtual_tokens,
    )  # fmt: skip


def test_seeds_are_fixed_for_ever() -> None:
    """Clients keep seeds in their own tests: another derivation would break them."""
    assert derive_seed(7, 0, 0) == 8734761627868563394
    assert derive_seed(-1, 2, 3) == 5777387944546922568


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 255), st.integers(0, 7))
def test_seed_is_within_63_bits_and_differs_between_rows(seed: int, item: int, sample: int) -> None:
    made = derive_seed(seed, item, sample)

    assert 0 <= made < 2**63
    assert made != derive_seed(seed, item, sample + 1)
    assert made != derive_seed(seed, item + 1, sample)


@given(st.integers(1, 100), st.integers(0, 100), st.integers(0, 100), st.integers(1, 200))
def test_length_is_refused_exactly_when_the_sum_is_too_large(tokens: int, virtual: int, new: int, limit: int) -> None:
    if tokens + virtual + new <= limit:
        check_length(tokens, virtual, new, limit)
        return
    with pytest.raises(ContextLengthExceededError) as refused:
        check_length(tokens, virtual, new, limit)
    assert refused.value.param == ("max_tokens" if tokens + virtual < limit else "prompt")
    assert f"maximum context length is {limit} tokens" in refused.value.message


def test_text_of_several_items_is_tokenised_once() -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def __call__(self, text: str, **arguments: bool):  # type: ignore[no-untyped-def]
            Counting.calls += 1
            return super().__call__(text, **arguments)

    spec = GenerationSpec(prompts=("x",) * 5, references=tuple("abcde"), n=1, sampling=SamplingParams())
    ids = tokenize(spec, TokenCodec(Counting(), VOCAB_SIZE), 4096)

    assert len(ids) == 5
    assert Counting.calls == 1
    assert spec.num_chars == 1


def test_text_without_tokens_is_refused() -> None:
    class Forgetful(ByteTokenizer):
        def __call__(self, text: str, **arguments: bool):  # type: ignore[no-untyped-def]
            return {"input_ids": []}

    spec = GenerationSpec(prompts=("a", "b"), references=("t", "t"), n=1, sampling=SamplingParams())
    with pytest.raises(InvalidRequestError) as refused:
        tokenize(spec, TokenCodec(Forgetful(), VOCAB_SIZE), 4096)
    assert refused.value.param == "prompt.0"


@pytest.mark.parametrize(("prompts", "param"), [(("b",), "prompt"), (("a", "b"), "prompt.1")])
def test_text_whose_tokens_the_backbone_does_not_have_is_refused(prompts: tuple[str, ...], param: str) -> None:
    class Larger(ByteTokenizer):
        """Knows a token more than the backbone, as tokenizers with added tokens do."""

        def __call__(self, text: str, **arguments: bool):  # type: ignore[no-untyped-def]
            return {"input_ids": [VOCAB_SIZE - 1, VOCAB_SIZE if text == "b" else 0]}

    spec = GenerationSpec(prompts=prompts, references=("t",) * len(prompts), n=1, sampling=SamplingParams())
    with pytest.raises(InvalidRequestError) as refused:
        tokenize(spec, TokenCodec(Larger(), VOCAB_SIZE), 4096)
    assert refused.value.param == param


@pytest.mark.parametrize(("prompts", "param"), [(("x" * 10**6,), "prompt"), (("a", "x" * 10**6), "prompt.1")])
def test_text_that_is_far_too_long_is_refused_by_what_its_beginning_has(prompts: tuple[str, ...], param: str) -> None:
    spec = GenerationSpec(prompts=prompts, references=("t",) * len(prompts), n=1, sampling=SamplingParams())
    with pytest.raises(ContextLengthExceededError) as refused:
        tokenize(spec, TokenCodec(ByteTokenizer(), VOCAB_SIZE), 4096)
    assert refused.value.param == param
    assert refused.value.message == (
        "This model's maximum context length is 4096 tokens. However, you requested at least 32256 tokens in the "
        "prompt. Please reduce the length of the prompt."
    )


@pytest.mark.parametrize(("top", "n"), [(0, 1), (0, 8), (20, 1), (20, 2)])
def test_log_probabilities_of_a_prompt_are_asked_for_up_to_a_bound(top: int, n: int) -> None:
    def make(num_tokens: int) -> None:
        spec = GenerationSpec(
            prompts=((1,) * num_tokens,),
            references=("t",),
            n=n,
            sampling=SamplingParams(max_tokens=0, prompt_logprobs=top),
        )
        make_generation(
            spec,
            generation_id="g",
            tenant="x",
            token_ids=spec.prompts,
            prompts={"t": None},
            max_model_len=10**7,  # type: ignore[arg-type]
        )

    most = MAX_PROMPT_LOGPROBS // (n * (top + 1))
    make(most)
    with pytest.raises(InvalidRequestError) as refused:
        make(most + 1)
    assert (refused.value.param, refused.value.code) == ("logprobs", "invalid_request")


def test_rows_are_numbered_by_item_and_sample_and_hold_their_prompt() -> None:
    ref = make_ref()
    spec = GenerationSpec(
        prompts=("x", (1, 2)), references=("t", "bare"), n=2, sampling=SamplingParams(seed=5, max_tokens=3)
    )
    generation = make_generation(
        spec, generation_id="g", tenant="acme", token_ids=((9,), (1, 2)), prompts={"t": ref, "bare": None},
        max_model_len=100,
    )  # fmt: skip

    assert [row.row_id for row in generation.rows] == ["g-0", "g-1", "g-2", "g-3"]
    assert [row.prompt for row in generation.rows] == [ref, ref, None, None]
    assert [row.token_ids for row in generation.rows] == [(9,), (9,), (1, 2), (1, 2)]
    assert {row.tenant for row in generation.rows} == {"acme"}
    assert (generation.num_prompt_tokens, generation.num_virtual_tokens) == (3, 4)
    assert generation.digests == ("d" * 64, None)
    assert [item.text for item in generation.items] == ["x", None]


@given(st.integers(1, 120), st.integers(0, 30), st.integers(1, 120), st.integers(0, 60), st.integers(1, 100))
def test_a_row_may_fill_what_its_prompt_leaves(
    tokens: int, virtual: int, bound: int, min_tokens: int, limit: int
) -> None:
    spec = GenerationSpec(
        prompts=((1,) * tokens,), references=("t",), n=1, fills_context=True, param="messages",
        sampling=SamplingParams(max_tokens=bound, min_tokens=min(min_tokens, bound)),
    )  # fmt: skip
    left = limit - tokens - virtual

    def make() -> int:
        generation = make_generation(
            spec, generation_id="g", tenant="acme", token_ids=((1,) * tokens,),
            prompts={"t": make_ref(num_virtual_tokens=virtual)}, max_model_len=limit,
        )  # fmt: skip
        return generation.rows[0].sampling.max_tokens

    if left >= max(1, spec.sampling.min_tokens):
        assert make() == min(bound, left)
        return
    with pytest.raises(ContextLengthExceededError) as refused:
        make()
    assert refused.value.param == ("max_tokens" if left > 0 else "messages")


@pytest.mark.parametrize(("fills_context", "expected"), [(True, 2 * USUAL_ANSWER_TOKENS), (False, 2 * 4000)])
def test_a_usual_answer_is_reckoned_with_where_the_client_set_no_bound(fills_context: bool, expected: int) -> None:
    spec = GenerationSpec(
        prompts=((1,),), references=("t",), n=2, fills_context=fills_context, sampling=SamplingParams(max_tokens=4000)
    )
    generation = make_generation(
        spec, generation_id="g", tenant="acme", token_ids=((1,),), prompts={"t": None}, max_model_len=8192
    )

    assert generation.num_expected_tokens == expected
    assert {row.sampling.max_tokens for row in generation.rows} == {4000}
