"""Both ways of truncating keep what a plain sort keeps; one of them asks nothing of the device."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from server.engine import truncation
from server.engine.logprobs import DeviceLogprobs
from server.engine.request import SamplingParams
from server.engine.sampler import SamplerRow, sample_async
from server.engine.truncation import truncate
from tests.unit.engine.no_waiting import WaitedError, no_waiting
from tests.unit.engine.sampler_oracle import plain_sample

VOCAB_SIZE = 40
NUM_RANKED = 6

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, NUM_RANKED, NUM_RANKED + 1, 20, VOCAB_SIZE, 999]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-9, 9, width=16), max_size=3),
    logprobs=st.sampled_from([None, 0, 3]),
)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9)
rows = st.builds(
    lambda p, ids, num, seed, banned, wants: SamplerRow(p, ids, min(num, len(ids)), seed, banned, wants),
    params,
    tokens,
    st.integers(1, 6),
    st.integers(0, 2**63),
    st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    st.booleans(),
)


@pytest.fixture
def few_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "NUM_RANKED", NUM_RANKED)


@pytest.mark.usefixtures("few_ranked")
@pytest.mark.parametrize("may_wait", [True, False])
@given(st.lists(rows, min_size=1, max_size=7), st.integers(0, 10**6))
@settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_batch_is_sampled_as_a_plain_sampler_samples_each_row(
    may_wait: bool, batch: list[SamplerRow], seed: int
) -> None:
    logits = torch.randn((len(batch), VOCAB_SIZE), generator=torch.Generator().manual_seed(seed)) * 2
    found = sample_async(logits, batch, may_wait=may_wait).to_host()
    for one, expected in zip(found, plain_sample(logits, batch), strict=True):
        assert one.token_id == expected.token_id
        assert (one.logprob is None) == (expected.logprob is None)
        if one.logprob is not None and expected.logprob is not None:
            assert [token for token, _ in one.logprob.top] == [token for token, _ in expected.logprob.top]
            assert one.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)


@pytest.mark.usefixtures("few_ranked")
@pytest.mark.parametrize("may_wait", [True, False])
@pytest.mark.parametrize("top_k", [3, NUM_RANKED, NUM_RANKED + 2])
def test_exactly_k_stay_where_all_are_equal(may_wait: bool, top_k: int) -> None:
    kept = truncate(torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE), [SamplingParams(top_k=top_k)] * 2, may_wait=may_wait)
    assert (kept > 0).sum(dim=1).tolist() == [top_k] * 2


EVERYTHING = [
    SamplingParams(temperature=0.0),
    SamplingParams(top_p=0.99),
    SamplingParams(top_k=3, top_p=0.5),
    SamplingParams(top_k=NUM_RANKED + 3, min_p=0.01),
    SamplingParams(logit_bias={3: 1.0}, logprobs=5),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.1),
]


@pytest.mark.usefixtures("few_ranked")
@pytest.mark.parametrize("chosen", [EVERYTHING, EVERYTHING[:1], EVERYTHING[1:2], EVERYTHING[2:3], EVERYTHING[:3]])
def test_nothing_is_asked_of_the_device_until_the_tokens_are_wanted(chosen: list[SamplingParams]) -> None:
    batch = [SamplerRow(p, [1, 2, 3, 2], 2, seed=i, banned=frozenset({5})) for i, p in enumerate(chosen)]
    logits = torch.randn((len(batch), VOCAB_SIZE), generator=torch.Generator().manual_seed(1))
    with no_waiting():
        sample = sample_async(logits, batch, may_wait=False)
        DeviceLogprobs(logits, sample.token_ids, [None, 2, 0, 1, None, 4][: len(batch)])
    assert [s.token_id for s in sample.to_host()] == [s.token_id for s in plain_sample(logits, batch)]


@pytest.mark.usefixtures("few_ranked")
def test_the_way_that_may_ask_does_and_is_seen_to() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, VOCAB_SIZE)))
    with pytest.raises(WaitedError), no_waiting():
        sample_async(logits, [SamplerRow(SamplingParams(top_p=0.99), [1], 1, seed=1)], may_wait=True)
