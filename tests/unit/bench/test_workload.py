"""Requests are drawn from a seed, with the lengths and the prompts that were asked for."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from server.bench.workload import (
    FIRST_TOKEN_ID,
    Lengths,
    PromptPicker,
    RandomPrompts,
    RequestSource,
    WorkloadError,
    make_workload,
)

EMBEDDINGS = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)


def make_source(*, seed: int = 0, num_prompts: int = 3, zipf: float | None = None, new: str = "4-9") -> RequestSource:
    return RequestSource(
        vocab_size=50,
        prompt_tokens=Lengths.parse("lognormal:8:0.9:2-30"),
        new_tokens=Lengths.parse(new),
        picker=PromptPicker(num_prompts, zipf=zipf, seed=seed),
        seed=seed,
    )


def test_the_seed_alone_decides_what_is_drawn() -> None:
    assert make_source(seed=5).take(40) == make_source(seed=5).take(40)
    assert make_source(seed=5).take(40) != make_source(seed=6).take(40)


def test_tokens_and_lengths_do_not_depend_on_the_prompts() -> None:
    few, many, none = (make_source(num_prompts=n).take(40) for n in (1, 7, 0))

    assert [(r.token_ids, r.num_new_tokens) for r in few] == [(r.token_ids, r.num_new_tokens) for r in many]
    assert [r.prompt for r in none] == [None] * 40
    assert [r.prompt for r in many] == [i % 7 for i in range(40)]


def test_an_endless_source_has_the_shape_of_a_counted_one() -> None:
    drawn = list(islice(make_source(), 600))

    assert len(drawn) == 600
    assert [r.prompt for r in drawn] == [i % 3 for i in range(600)]
    assert {type(i) for r in drawn for i in (*r.token_ids, r.num_new_tokens)} == {int}
    ids = [i for r in drawn for i in r.token_ids]
    assert (min(ids), max(ids)) == (FIRST_TOKEN_ID, 49)


def test_lognormal_lengths_have_the_median_and_the_spread_that_were_asked_for() -> None:
    drawn = Lengths.parse("lognormal:100:0.5:1-100000").draw(np.random.default_rng(1), 20_000)

    assert np.median(drawn) == pytest.approx(100, rel=0.02)
    assert np.std(np.log(drawn)) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(("text", "low", "high"), [("7", 7, 7), ("2-5", 2, 5), ("lognormal:3:2:2-5", 2, 5)])
def test_lengths_reach_both_ends_and_never_leave_them(text: str, low: int, high: int) -> None:
    lengths = Lengths.parse(text)
    drawn = lengths.draw(np.random.default_rng(1), 2000)

    assert (drawn.min(), drawn.max()) == (low, high)
    assert drawn.dtype == np.int64
    assert Lengths.parse(str(lengths)) == lengths


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "0", "5-4", "-3", "1.5", "9999999999", "٣"),
        *("lognormal:8:0.9", "lognormal:9:1:2-8", "lognormal:8:0:2-9", "lognormal:x:1:2-9", "lognormal:nan:1:2-9"),
        *("lognormal:8:nan:2-9", "normal:8:1:2-9"),
    ],
)
def test_lengths_that_make_no_sense_are_refused_by_name(text: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        Lengths.parse(text, "--new-tokens")

    assert caught.value.field == "--new-tokens"


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_prompts_are_picked_by_zipf_s_law(exponent: float) -> None:
    num_prompts, count = 20, 40_000
    picked = Counter(PromptPicker(num_prompts, zipf=exponent, seed=3).pick(count))

    weights = np.array([1 / (rank + 1) ** exponent for rank in range(num_prompts)])
    expected = count * weights / weights.sum()
    observed = np.array([picked[i] for i in range(num_prompts)])
    # Chi-square with 19 degrees of freedom: 43.8 is passed once in a thousand seeds.
    assert float(((observed - expected) ** 2 / expected).sum()) < 43.8


def test_zipf_s_choice_depends_on_the_seed() -> None:
    first, again, other = (PromptPicker(9, zipf=1.0, seed=seed).pick(50) for seed in (1, 1, 2))

    assert first == again
    assert first != other


@pytest.mark.parametrize("exponent", [-0.1, 101.0, float("nan")])
def test_a_zipf_exponent_out_of_range_is_refused(exponent: float) -> None:
    with pytest.raises(WorkloadError) as caught:
        PromptPicker(3, zipf=exponent)

    assert caught.value.field == "zipf"


def test_random_prompts_are_rows_of_the_vocabulary_and_the_same_at_every_look() -> None:
    prompts = RandomPrompts(EMBEDDINGS, num_prompts=5, k=3, seed=2)

    assert len(prompts) == len(list(prompts)) == 5
    assert prompts[4].shape == (3, 4)
    assert all((row == EMBEDDINGS).all(axis=1).any() for prompt in prompts for row in prompt)
    np.testing.assert_array_equal(prompts[1:3][1], prompts[2])
    np.testing.assert_array_equal(prompts[-1], prompts[4])
    assert not np.array_equal(prompts[0], prompts[1])


def test_the_benchmarks_workload_is_what_it_was_before_it_moved_here() -> None:
    # The results that are kept were measured with it.
    workload = make_workload(EMBEDDINGS, num_requests=9, num_prompts=2, k=3, new_tokens="lognormal", seed=7)

    rng = np.random.default_rng(7)
    lengths = rng.integers(8, 65, 9)
    assert [r.token_ids for r in workload.requests] == [tuple(rng.integers(3, 50, int(n)).tolist()) for n in lengths]
    new = np.clip(np.round(rng.lognormal(np.log(24), 0.9, 9)), 4, 128)
    assert [r.num_new_tokens for r in workload.requests] == new.tolist()
    np.testing.assert_array_equal(workload.prompts[0], EMBEDDINGS[np.random.default_rng(8).integers(3, 50, 3)])
    assert workload.num_new_tokens == new.sum()


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    with pytest.raises(WorkloadError) as vocabulary:
        RequestSource(
            vocab_size=3,
            prompt_tokens=Lengths.fixed(1),
            new_tokens=Lengths.fixed(1),
            picker=PromptPicker(0),
            seed=0,
        )
    with pytest.raises(WorkloadError) as length:
        RandomPrompts(EMBEDDINGS, num_prompts=1, k=0, seed=0)
    with pytest.raises(WorkloadError) as kind:
        make_workload(EMBEDDINGS, num_requests=1, num_prompts=1, k=1, new_tokens="long", seed=0)

    assert [e.value.field for e in (vocabulary, length, kind)] == ["vocab_size", "k", "new_tokens"]
