"""What a step's logits become: log-probabilities of the prompt, tokens, text and ends, with logits made by hand."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pages import PageLedger
from server.engine.plan import build_plan
from server.engine.request import RowOutput, RowRequest, SamplingParams
from server.engine.results import StepResults
from server.engine.row import Row, RowState
from server.engine.row_pages import RowPages
from server.engine.scheduler import ScheduledRow
from server.engine.step import plan_entry
from server.engine.text import TextStream
from server.errors import NumericalError
from tests.fakes import EOS_ID, VOCAB_SIZE, ByteTokenizer

STOP_ID = 65
RESULTS = StepResults(frozenset({EOS_ID}))


def make_row(prompt: str = "abc", *, serial: int = 1, is_audited: bool = False, **sampling: Any) -> Row:
    request = RowRequest(
        row_id=f"row-{serial}",
        tenant="default",
        token_ids=tuple(prompt.encode()),
        prompt=None,
        sampling=SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | sampling)),
    )
    stream = TextStream(
        ByteTokenizer(),
        context=request.token_ids,
        stop=request.sampling.stop,
        skip_special_tokens=request.sampling.skip_special_tokens,
    )
    row = Row(request=request, serial=serial, arrived_at_s=0.0, text=stream, is_audited=is_audited)
    row.pages = RowPages(128)
    row.pages.append(np.arange(8, dtype=np.int32) + 8 * (serial - 1), PageLedger(64))
    row.state = RowState.RUNNING
    return row


def logits_for(token_ids: Sequence[int]) -> torch.Tensor:
    """Logits `[len(token_ids), VOCAB_SIZE]`: each of the tokens is by far the likeliest, then comes its successor."""
    logits = torch.zeros(len(token_ids), VOCAB_SIZE)
    for i, token_id in enumerate(token_ids):
        logits[i, token_id] = 20.0
        logits[i, (token_id + 1) % VOCAB_SIZE] = 10.0
    return logits


def collect(items: Sequence[tuple[Row, int]], logits: torch.Tensor) -> dict[str, RowOutput]:
    """Run a step in which each row computes so many tokens; `logits` follow the order of the plan."""
    scheduled = [ScheduledRow(row, num_tokens) for row, num_tokens in items]
    plan, order = build_plan([plan_entry(item) for item in scheduled])
    launched = RESULTS.launch(plan, [scheduled[i] for i in order], logits)
    return {output.row_id: output for _, output in RESULTS.collect(launched)}


def step(row: Row, token_id: int) -> RowOutput:
    """Compute all that the row has and let the backbone want `token_id`."""
    return collect([(row, row.num_uncomputed)], logits_for([token_id]))[row.row_id]


def generate(row: Row, token_ids: Sequence[int]) -> list[RowOutput]:
    outputs = []
    for token_id in token_ids:
        outputs.append(step(row, token_id))
        if outputs[-1].is_last:
            break
    return outputs


def text_of(outputs: Sequence[RowOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_row_ends_at_its_length() -> None:
    outputs = generate(make_row(max_tokens=3), b"xyzzy")

    assert text_of(outputs) == "xyz"
    assert [o.finish_reason for o in outputs] == [None, None, "length"]
    assert [o.token_ids for o in outputs] == [(120,), (121,), (122,)]


def test_eos_ends_the_row_and_is_reported_but_not_shown() -> None:
    outputs = generate(make_row(skip_special_tokens=False), [*b"hi", EOS_ID, *b"more"])

    assert text_of(outputs) == "hi"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)
    assert outputs[-1].token_ids == (EOS_ID,)


def test_ignored_eos_is_an_ordinary_token() -> None:
    outputs = generate(make_row(ignore_eos=True, max_tokens=4), [*b"h", EOS_ID, *b"i", *b"!"])

    assert [o.finish_reason for o in outputs] == [None, None, None, "length"]
    assert text_of(outputs) == "hi!"


def test_stop_token_ends_the_row_and_is_named() -> None:
    outputs = generate(make_row(stop_token_ids=(STOP_ID, 66)), [*b"hi", STOP_ID])

    assert text_of(outputs) == "hi"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", STOP_ID)


def test_stop_token_ends_a_row_that_ignores_eos() -> None:
    outputs = generate(make_row(ignore_eos=True, stop_token_ids=(EOS_ID,)), [*b"hi", EOS_ID])

    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", EOS_ID)


def test_stop_string_ends_the_row_and_is_named_but_never_delivered() -> None:
    outputs = generate(make_row(stop=("lo w",), max_tokens=20), b"hello world")

    assert text_of(outputs) == "hel"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "lo w")
    assert bytes(token_id for o in outputs for token_id in o.token_ids) == b"hello w"


def test_stop_string_complete_with_the_last_token_is_still_a_stop() -> None:
    outputs = generate(make_row(stop=("c",), max_tokens=3), b"abc")

    assert (text_of(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason) == ("ab", "stop", "c")


@pytest.mark.parametrize("end", [[*b"st", EOS_ID], [*b"st", STOP_ID], [*b"sto"]])
def test_text_held_back_for_a_stop_string_comes_with_the_end(end: list[int]) -> None:
    outputs = generate(make_row(stop=("stop",), stop_token_ids=(STOP_ID,), max_tokens=4), [*b"a", *end])

    assert outputs[-1].is_last
    assert text_of(outputs) == "a" + bytes(i for i in end if i not in (EOS_ID, STOP_ID)).decode()


def test_half_a_character_is_delivered_at_the_end() -> None:
    outputs = generate(make_row(max_tokens=2), [*b"a", "é".encode()[0]])

    assert text_of(outputs) == "a�"


@pytest.mark.parametrize("unwanted", [EOS_ID, STOP_ID])
def test_row_does_not_end_before_its_least_length(unwanted: int) -> None:
    outputs = generate(make_row(min_tokens=3, stop_token_ids=(STOP_ID,), max_tokens=10), [unwanted] * 10)

    # Until then the next likeliest token is taken.
    assert [o.token_ids[0] for o in outputs[:3]] == [(unwanted + 1) % VOCAB_SIZE] * 3
    assert outputs[3].token_ids == (unwanted,)
    assert outputs[3].finish_reason == "stop"


def test_stop_string_counts_only_after_the_least_length() -> None:
    outputs = generate(make_row(min_tokens=2, stop=("b",), max_tokens=8), b"abcbd")

    assert (text_of(outputs), outputs[-1].stop_reason) == ("abc", "b")


@pytest.mark.parametrize("chunks", [(5,), (2, 3), (1, 1, 1, 1, 1), (4, 1)])
def test_prompt_logprobs_of_chunks_are_those_of_the_whole(chunks: tuple[int, ...]) -> None:
    logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)
    row = make_row("hello", prompt_logprobs=2, logprobs=1)
    first = 0
    outputs: dict[str, RowOutput] = {}
    for num_tokens in chunks:
        assert not outputs
        outputs = collect([(row, num_tokens)], logits[first : first + num_tokens])
        first += num_tokens
    found = outputs["row-1"].prompt_logprobs

    assert found is not None
    assert found[0] is None
    for i, token_id in enumerate(b"ello"):
        entry = found[i + 1]
        assert entry is not None
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(expected[i, token_id]), abs=1e-5)
        assert [t for t, _ in entry.top[:2]] == expected[i].argsort(descending=True)[:2].tolist()
    assert len(found) == 5
    assert outputs["row-1"].token_ids == (int(logits[4].argmax()),)
    assert step(row, 100).prompt_logprobs is None


def test_prompt_is_scored_without_generating() -> None:
    row = make_row("hello", prompt_logprobs=0, max_tokens=0)
    (output,) = collect([(row, 5)], torch.zeros(5, VOCAB_SIZE)).values()

    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "length")
    assert output.prompt_logprobs is not None
    assert [None if e is None else e.token_id for e in output.prompt_logprobs] == [None, *b"ello"]
    assert all(e.logprob == pytest.approx(-math.log(VOCAB_SIZE)) for e in output.prompt_logprobs if e is not None)


def test_prompt_of_one_token_has_one_entry_without_a_value() -> None:
    row = make_row("h", prompt_logprobs=0, max_tokens=0)
    (output,) = collect([(row, 1)], torch.zeros(1, VOCAB_SIZE)).values()

    assert output.prompt_logprobs == (None,)


def test_logprobs_are_reported_only_to_those_who_asked() -> None:
    audited = make_row(is_audited=True)
    asked = make_row(serial=2, logprobs=1)
    for row in (audited, asked):
        output = step(row, 100)
        assert len(output.logprobs) == (1 if row is asked else 0)
    assert len(audited.audit_logprobs) == 1
    assert asked.audit_logprobs == []


def test_chunk_that_does_not_reach_the_end_yields_nothing() -> None:
    row = make_row("hello")
    outputs = collect([(row, 3)], torch.empty(0, VOCAB_SIZE))

    assert outputs == {}
    assert (row.num_computed, row.num_generated) == (3, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_row_whose_logits_are_not_finite_ends_alone(bad: float, at: int) -> None:
    rows = [make_row("abc", serial=1 + i, prompt_logprobs=1) for i in range(2)]
    logits = logits_for(list(b"bcXbcY"))
    logits[at, 7] = bad
    outputs = collect([(row, 3) for row in rows], logits)

    broken, healthy = outputs["row-1"], outputs["row-2"]
    assert isinstance(broken.error, NumericalError)
    assert (broken.token_ids, broken.text, broken.prompt_logprobs) == ((), "", None)
    assert rows[0].num_generated == 0
    assert healthy.error is None
    assert healthy.token_ids == (ord("Y"),)
    assert healthy.prompt_logprobs is not None


def test_step_of_mixed_rows_gives_each_row_its_own_logits() -> None:
    decoding = make_row("q", serial=3)
    chunk = make_row("hello", serial=1)
    scored = make_row("abc", serial=2, prompt_logprobs=0)
    unfinished = make_row("long prompt", serial=4)
    # Plan order: the row with one token first, then chunks as they were given.
    logits = logits_for([ord("D"), ord("C"), ord("b"), ord("c"), ord("S")])
    outputs = collect([(chunk, 5), (scored, 3), (unfinished, 4), (decoding, 1)], logits)

    assert {row_id: o.token_ids for row_id, o in outputs.items()} == {
        "row-3": (ord("D"),),
        "row-1": (ord("C"),),
        "row-2": (ord("S"),),
    }
    scores = outputs["row-2"].prompt_logprobs
    assert scores is not None
    assert all(entry.logprob > -0.1 for entry in scores if entry is not None)


def test_cached_tokens_are_told_once_with_the_first_token() -> None:
    row = make_row("hello")
    row.num_cached = row.num_computed = 3
    outputs = generate(row, b"xy")

    assert [output.num_cached for output in outputs] == [3, 0]
    scored = make_row("hello", max_tokens=0, serial=2)
    scored.num_cached = scored.num_computed = 4
    (output,) = collect([(scored, 1)], logits_for([1])).values()
    assert output.num_cached == 4


def test_row_that_was_preempted_meanwhile_and_runs_again_gets_nothing_of_the_step() -> None:
    row = make_row("hello")
    item = ScheduledRow(row, 5)
    plan, _ = build_plan([plan_entry(item)])
    launched = RESULTS.launch(plan, [item], logits_for([100]))
    assert (row.num_computed, row.num_in_flight, row.num_pending) == (5, 5, 1)
    row.num_computed = row.num_in_flight = row.num_pending = 0
    row.num_preemptions += 1

    assert list(RESULTS.collect(launched)) == []
    assert (row.num_in_flight, row.num_pending, row.num_generated) == (0, 0, 0)


def test_launch_counts_what_the_step_computes_and_collecting_it_says_which_tokens() -> None:
    row, other = make_row("hello", max_tokens=2), make_row("hi", serial=2)
    items = [ScheduledRow(other, 1), ScheduledRow(row, 5)]
    plan, order = build_plan([plan_entry(item) for item in items])
    launched = RESULTS.launch(plan, [items[i] for i in order], logits_for([101]))
    assert (row.num_uncomputed, row.sample_place, row.num_settled_columns) == (1, 0, 0)
    assert (other.num_uncomputed, other.num_pending, other.num_in_flight) == (1, 0, 1)
    assert launched.sampled_for.tolist() == [row.serial]

    (given,) = RESULTS.collect(launched)
    assert (given[0], given[1].token_ids) == (row, (101,))
    assert (row.num_uncomputed, row.num_settled_columns, other.num_in_flight) == (1, 5, 0)


def test_row_whose_last_token_is_on_its_way_has_nothing_left_to_compute() -> None:
    row = make_row("hello", max_tokens=1)
    item = ScheduledRow(row, 5)
    plan, _ = build_plan([plan_entry(item)])
    launched = RESULTS.launch(plan, [item], logits_for([100]))
    assert row.num_uncomputed == 0

    ((_, output),) = RESULTS.collect(launched)
    assert output.finish_reason == "length"


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_texts_and_tokens_agree_at_the_end(wanted: list[int], max_tokens: int, min_tokens: int) -> None:
    row = make_row(max_tokens=max_tokens, min_tokens=min_tokens, stop=("ab",), logprobs=0)
    outputs = generate(row, wanted * max_tokens)
    last, generated = outputs[-1], row.token_ids[3:]

    assert last.is_last
    assert [o.is_last for o in outputs].count(True) == 1
    assert [t for o in outputs for t in o.token_ids] == generated
    assert [p.token_id for o in outputs for p in o.logprobs] == generated
    shown = [i for i in generated if i != EOS_ID]
    whole = ByteTokenizer().decode(shown, skip_special_tokens=True)
    if last.stop_reason == "ab":
        assert text_of(outputs) + "ab" == whole
    else:
        assert text_of(outputs) == whole
    assert len(generated) > min_tokens or last.finish_reason == "length"
