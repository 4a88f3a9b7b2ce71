"""Choosing tokens, compared with a plain numpy sampler that treats one row at a time in float64."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.engine.request import SamplingParams
from server.engine.sampler import LOWEST_LOGPROB, SamplerRow, reads_own_tokens, sample, token_logprobs, uniform

VOCAB_SIZE = 24
GREEDY = SamplingParams(temperature=0.0)

FloatArray = npt.NDArray[np.float64]


def make_logits(seed: int, rows: int = 1, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(seed)) * scale


def make_row(
    params: SamplingParams, *, prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), **kwargs: Any
) -> SamplerRow:
    return SamplerRow(
        params=params, token_ids=[*prompt, *generated], num_prompt_tokens=len(prompt), **({"seed": 7} | kwargs)
    )


def token_of(logits: torch.Tensor, row: SamplerRow) -> int | None:
    (sampled,) = sample(logits, [row])
    return sampled.token_id


def expected_logits(logits: torch.Tensor, row: SamplerRow) -> FloatArray:
    """Bias and bans, then penalties: vLLM's order."""
    values = logits[0].double().numpy().copy()
    params = row.params
    for token_id, bias in params.logit_bias.items():
        values[token_id] += bias
    for token_id in row.banned:
        values[token_id] = -math.inf
    for token_id in set(row.token_ids):
        factor = params.repetition_penalty
        values[token_id] = values[token_id] / factor if values[token_id] > 0 else values[token_id] * factor
    generated = list(row.token_ids[row.num_prompt_tokens :])
    for token_id in set(generated):
        values[token_id] -= params.presence_penalty + params.frequency_penalty * generated.count(token_id)
    return values


def expected_probs(logits: FloatArray, params: SamplingParams) -> FloatArray:
    """Temperature, min_p, top_k, top_p. Discards examples in which rounding could move a border."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    probs = weights / weights.sum()
    least = params.min_p * probs.max()
    assume(not np.any(np.abs(probs - least) < 1e-6 * least))
    probs[probs < least] = 0.0
    order = np.argsort(-probs, kind="stable")
    if params.top_k:
        probs[order[params.top_k :]] = 0.0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    assume(not np.any(np.abs(before - params.top_p) < 1e-6))
    probs[order[(before >= params.top_p) & (np.arange(len(order)) > 0)]] = 0.0
    return probs / probs.sum()


def expected_token(probs: FloatArray, draw: float) -> int:
    """The token at which the cumulative probability passes the draw."""
    cumulative = np.cumsum(probs)
    assume(not np.any(np.abs(cumulative - draw) < 1e-5))
    return int(np.searchsorted(cumulative, draw, side="right"))


token_ids = st.integers(0, VOCAB_SIZE - 1)
adjusted_rows = st.builds(
    make_row,
    st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.3, 2.0]),
        presence_penalty=st.sampled_from([0.0, -1.5, 0.6, 2.0]),
        frequency_penalty=st.sampled_from([0.0, -0.7, 0.4, 2.0]),
        logit_bias=st.dictionaries(token_ids, st.floats(-10, 10, width=16), max_size=5),
    ),
    prompt=st.lists(token_ids, min_size=1, max_size=6).map(tuple),
    generated=st.lists(token_ids, max_size=8).map(tuple),
    banned=st.frozensets(token_ids, max_size=4),
)
truncations = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 10, VOCAB_SIZE, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@given(st.integers(0, 10**6), adjusted_rows)
@settings(deadline=None, max_examples=150)
def test_greedy_takes_the_best_token_after_bias_bans_and_penalties(seed: int, row: SamplerRow) -> None:
    logits = make_logits(seed)
    before = logits.clone()
    values = expected_logits(logits, row)
    best, second = np.sort(values)[::-1][:2]
    assume(best - second > 1e-4)

    assert token_of(logits, row) == int(values.argmax())
    assert torch.equal(logits, before)


@given(st.integers(0, 10**6), adjusted_rows, truncations, st.integers(0, 2**63))
@settings(deadline=None, max_examples=200)
def test_sampled_token_is_where_the_truncated_distribution_passes_the_draw(
    seed: int, row: SamplerRow, truncation: SamplingParams, row_seed: int
) -> None:
    params = replace(
        row.params,
        temperature=truncation.temperature,
        top_k=truncation.top_k,
        top_p=truncation.top_p,
        min_p=truncation.min_p,
    )
    row = replace(row, params=params, seed=row_seed)
    logits = make_logits(seed)
    probs = expected_probs(expected_logits(logits, row), params)

    assert token_of(logits, row) == expected_token(probs, uniform(row_seed, row.num_generated))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2), {0, 3}),
        (SamplingParams(top_p=0.55), {0, 3}),
        (SamplingParams(top_p=0.35), {0}),
        (SamplingParams(min_p=0.49), {0, 3, 2}),
        (SamplingParams(top_k=1), {0}),
        (SamplingParams(top_p=1e-9), {0}),
        (SamplingParams(top_p=0.0), {0}),
        (SamplingParams(), {0, 1, 2, 3}),
        # top_p is of what top_k left: 0.4 of 0.7 passes a half alone.
        (SamplingParams(top_k=2, top_p=0.55), {0}),
    ],
)
def test_truncation_leaves_exactly_the_likeliest_tokens(params: SamplingParams, expected: set[int]) -> None:
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log().expand(600, -1)
    sampled = sample(logits, [make_row(params, seed=seed) for seed in range(600)])

    assert {s.token_id for s in sampled} == expected


def test_ties_at_the_border_of_top_k_leave_exactly_k() -> None:
    rows = [make_row(SamplingParams(top_k=3), seed=seed) for seed in range(400)]
    found = {s.token_id for s in sample(torch.zeros(400, VOCAB_SIZE), rows)}

    assert len(found) == 3


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = make_logits(3, rows=8)
    params = SamplingParams(temperature=temperature)
    found = [s.token_id for s in sample(logits, [make_row(params, seed=seed) for seed in range(8)])]

    assert found == logits.argmax(dim=-1).tolist()


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((500, VOCAB_SIZE), -math.inf)
    logits[:, [5, 9]] = 0.0
    found = {s.token_id for s in sample(logits, [make_row(SamplingParams(), seed=seed) for seed in range(500)])}

    assert found == {5, 9}


def test_the_lowest_draw_takes_the_first_possible_token() -> None:
    # Solves uniform's first line for zero, which the mixing that follows maps to zero.
    seed = -0xD1B54A32D192ED03 * pow(0x9E3779B97F4A7C15, -1, 1 << 64) % (1 << 64)
    assert uniform(seed, 0) == 0.0
    logits = torch.full((1, VOCAB_SIZE), -math.inf)
    logits[0, [5, 9]] = 0.0

    assert token_of(logits, make_row(SamplingParams(), seed=seed)) == 5


def test_draws_follow_the_distribution() -> None:
    num_draws, probs = 20_000, np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    logits = torch.from_numpy(np.log(probs)).float().expand(num_draws, -1)
    # Half the draws by seed, half by the token's index within one row: both must be uniform.
    by_seed = [make_row(SamplingParams(), seed=seed) for seed in range(num_draws // 2)]
    by_index = [
        SamplerRow(params=SamplingParams(), token_ids=range(n + 1), num_prompt_tokens=1, seed=20)
        for n in range(num_draws // 2)
    ]
    for rows in (by_seed, by_index):
        found = [s.token_id for s in sample(logits[: len(rows)], rows)]
        counts = np.bincount(np.array(found), minlength=len(probs))
        expected = probs * len(rows)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 24.3  # the 99.9% quantile at 7 degrees of freedom; the seeds are fixed


def test_neighbouring_seeds_and_indices_draw_independently() -> None:
    draws = np.array([[uniform(seed, index) for index in range(300)] for seed in range(300)])

    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    for shifted in (draws[1:, :], draws[:, 1:], draws[1:, 1:]):
        here = draws[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(here.ravel(), shifted.ravel())[0, 1]) < 0.015
    assert len(np.unique(draws)) == draws.size


mixed_rows = st.one_of(
    adjusted_rows,
    st.builds(lambda row, params, seed: replace(row, params=params, seed=seed), adjusted_rows, truncations, token_ids),
)


@given(st.integers(0, 10**6), mixed_rows, st.lists(mixed_rows, max_size=6), st.data())
@settings(deadline=None, max_examples=100)
def test_a_rows_token_does_not_depend_on_what_shares_the_batch(
    seed: int, row: SamplerRow, others: list[SamplerRow], data: st.DataObject
) -> None:
    logits = make_logits(seed, rows=len(others) + 1)
    at = data.draw(st.integers(0, len(others)))
    rows = [*others[:at], row, *others[at:]]
    batch = torch.cat([logits[1 : at + 1], logits[:1], logits[at + 1 :]])

    assert sample(batch, rows)[at] == sample(logits[:1], [row])[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_with_logits_that_are_not_finite_ends_alone(bad: float | str, temperature: float) -> None:
    logits = make_logits(5, rows=3)
    rows = [make_row(SamplingParams(temperature=temperature, logprobs=2), seed=seed) for seed in range(3)]
    healthy = sample(logits, rows)
    broken = logits.clone()
    if isinstance(bad, str):
        broken[1] = -math.inf
    else:
        broken[1, 4] = bad
    found = sample(broken, rows)

    assert (found[1].token_id, found[1].logprob) == (None, None)
    assert [found[0], found[2]] == [healthy[0], healthy[2]]


def test_minus_infinity_in_a_models_own_mask_does_no_harm() -> None:
    logits = make_logits(6)
    logits[0, 3] = -math.inf

    assert token_of(logits, make_row(GREEDY)) == int(logits.argmax())


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_alone_asks_for_the_tokens_that_a_row_has(penalty: str) -> None:
    assert not reads_own_tokens(SamplingParams(logit_bias={1: 2.0}, top_k=3))
    assert reads_own_tokens(SamplingParams(**{penalty: 0.5}))


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), []) == []


@given(st.integers(0, 10**6), st.lists(st.none() | st.integers(0, VOCAB_SIZE + 5), min_size=1, max_size=5), st.data())
@settings(deadline=None, max_examples=100)
def test_logprobs_are_the_backbones_and_sorted(seed: int, wanted: list[int | None], data: st.DataObject) -> None:
    logits = make_logits(seed, rows=len(wanted))
    chosen = [data.draw(token_ids) for _ in wanted]
    expected = logits.double() - logits.double().logsumexp(dim=-1, keepdim=True)

    for i, found in enumerate(token_logprobs(logits, chosen, wanted)):
        count = wanted[i]
        if count is None:
            assert found is None
            continue
        assert found is not None
        assert found.token_id == chosen[i]
        assert found.logprob == pytest.approx(float(expected[i, chosen[i]]), abs=1e-5)
        best = expected[i].argsort(descending=True)[:count].tolist()
        outside = [chosen[i]] if count and chosen[i] not in best else []
        assert [token for token, _ in found.top] == best + outside
        assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
        if count:
            assert dict(found.top)[chosen[i]] == found.logprob


def test_logprobs_are_those_before_penalties_and_temperature() -> None:
    logits = make_logits(8)
    best = int(logits.argmax())
    params = SamplingParams(temperature=1e-6, logit_bias={best: -100.0}, repetition_penalty=2.0, logprobs=1)
    (found,) = sample(logits, [make_row(params)])

    assert found.token_id != best
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(logits.log_softmax(-1)[0, found.token_id]), abs=1e-5)
    assert found.logprob.top[0][0] == best


def test_logprob_of_an_impossible_token_is_a_finite_number() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    (found,) = token_logprobs(logits, [1], [3])

    assert found is not None
    assert found.logprob == LOWEST_LOGPROB
    assert dict(found.top)[1] == LOWEST_LOGPROB


def test_audited_row_gets_the_chosen_tokens_logprob_unasked() -> None:
    logits = make_logits(9)
    assert sample(logits, [make_row(GREEDY)])[0].logprob is None
    (found,) = sample(logits, [make_row(GREEDY, wants_logprob=True)])

    assert found.logprob is not None
    assert found.logprob.top == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_full_precision(dtype: torch.dtype) -> None:
    logits = make_logits(10).to(dtype)
    (found,) = sample(logits, [make_row(SamplingParams(temperature=0.0, logprobs=0))])

    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(logits.float().log_softmax(-1).max()), abs=1e-6)
