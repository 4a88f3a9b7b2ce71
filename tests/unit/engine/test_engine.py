"""The engine's promises to those who submit rows: how rows end, what is refused, and what disturbs nobody else."""

import logging
from collections.abc import Callable

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.request import PromptRef
from server.errors import (
    ContextLengthExceededError,
    DrainingError,
    IsolationError,
    PromptCorruptError,
    PromptMismatchError,
    PromptmuxError,
    QueueFullError,
    UnavailableError,
)
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

EOS = 2
WAIT_S = 60.0


def with_prompts(backbone: Backbone, *refs: PromptRef, **config: float) -> SteppedEngine:
    prompts = {ref.prefix_key: make_prompt(backbone, ref, seed=seed) for seed, ref in enumerate(refs)}
    return SteppedEngine(backbone, prompts, **config)


# --- how rows end ---------------------------------------------------------------------------------------------------


def test_row_of_no_tokens_gives_its_prompt_logprobs_and_ends(llama: Backbone) -> None:
    token_ids = (5, 9, 14, 3, 77)
    result = SteppedEngine(llama, prefill_chunk=2).run(make_request("row", token_ids, max_tokens=0, prompt_logprobs=2))
    assert (result.token_ids, result.text, result.finish_reason) == ((), "", "length")
    assert result.prompt_logprobs is not None
    first, *others = result.prompt_logprobs
    assert first is None
    expected = torch.log_softmax(llama.reference(token_ids).float(), dim=-1)
    assert len(others) == len(token_ids) - 1
    for i, entry in enumerate(others):
        assert entry is not None
        assert entry.token_id == token_ids[i + 1]
        assert abs(entry.logprob - float(expected[i, entry.token_id])) < 1e-4


def test_eos_ends_a_row_without_text_of_its_own(llama: Backbone) -> None:
    result = SteppedEngine(llama).run(make_request("row", ignore_eos=False, logit_bias={EOS: 100.0}, max_tokens=9))
    assert (result.token_ids, result.text) == ((EOS,), "")
    assert (result.finish_reason, result.stop_reason) == ("stop", None)


def test_row_that_ignores_eos_runs_to_its_length(llama: Backbone) -> None:
    result = SteppedEngine(llama).run(make_request("row", ignore_eos=True, logit_bias={EOS: 100.0}, max_tokens=3))
    assert (result.token_ids, result.finish_reason) == ((EOS, EOS, EOS), "length")


def test_eos_and_stop_tokens_are_not_chosen_before_min_tokens(llama: Backbone) -> None:
    result = SteppedEngine(llama).run(
        make_request(
            "row",
            ignore_eos=False,
            logit_bias={EOS: 100.0, 33: 90.0},
            stop_token_ids=(33,),
            min_tokens=2,
            max_tokens=9,
        )
    )
    assert len(result.token_ids) == 3
    assert not {EOS, 33} & set(result.token_ids[:2])
    assert result.token_ids[2] == EOS


def test_stop_token_ends_a_row_and_is_named(llama: Backbone) -> None:
    stepped = SteppedEngine(llama)
    free = stepped.run(make_request("free", max_tokens=6)).token_ids
    stop = next(token for token in free if free.index(token) > 0)
    result = stepped.run(make_request("row", max_tokens=6, stop_token_ids=(stop,)))
    assert result.token_ids == free[: free.index(stop) + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_stop_string_ends_a_row_and_is_not_delivered(llama: Backbone) -> None:
    stepped = SteppedEngine(llama)
    text = stepped.run(make_request("free", max_tokens=8)).text
    stop = text[3:5]
    result = stepped.run(make_request("row", max_tokens=8, stop=("never there", stop)))
    assert result.text == text[: text.index(stop)]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_greedy_row_follows_the_models_own_argmax(llama: Backbone) -> None:
    result = SteppedEngine(llama).run(make_request("row", max_tokens=6, logprobs=1))
    ids = [10, 11, 12]
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        expected = torch.log_softmax(llama.reference(ids)[-1].float(), dim=-1)
        assert token == int(expected.argmax())
        assert abs(entry.logprob - float(expected[token])) < 1e-4
        ids.append(token)


def test_cancelled_rows_end_whether_they_wait_or_run_and_others_go_on(llama: Backbone) -> None:
    stepped = SteppedEngine(llama, max_rows=2)
    stepped.submit(*(make_request(f"row-{i}", max_tokens=6) for i in range(4)))
    stepped.turn()
    assert stepped.engine.status().num_running == 2
    stepped.engine.cancel(["row-0", "row-3", "unknown"])
    stepped.turn()
    stepped.engine.cancel(["row-0", "row-3"])
    stepped.finish()
    reasons = [stepped.result(f"row-{i}").finish_reason for i in range(4)]
    assert reasons == ["cancelled", "length", "length", "cancelled"]
    assert stepped.tokens("row-3") == ()
    assert len(stepped.tokens("row-1")) == 6
    assert stepped.is_idle()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_full_queue_refuses_all_rows_of_a_request_or_none(llama: Backbone) -> None:
    stepped = SteppedEngine(llama, max_waiting_rows=3, max_rows=2)
    stepped.submit(make_request("row-0"), make_request("row-1"))
    with pytest.raises(QueueFullError, match="the limit is 3"):
        stepped.submit(make_request("row-2"), make_request("row-3"))
    assert stepped.engine.status().num_waiting == 2
    stepped.submit(make_request("row-4"))
    stepped.finish()
    assert set(stepped.outputs) == {"row-0", "row-1", "row-4"}
    stepped.submit(make_request("row-5"))
    stepped.finish()


def test_row_that_fits_the_context_exactly_runs_and_one_token_more_is_refused(llama: Backbone) -> None:
    ref = make_ref("a", k=6)
    stepped = with_prompts(llama, ref)
    token_ids = [7] * (llama.max_model_len - 6 - 2)
    assert len(stepped.run(make_request("row", token_ids, ref, max_tokens=2)).token_ids) == 2
    with pytest.raises(ContextLengthExceededError, match="6 virtual, 248 prompt and 3 new tokens"):
        stepped.submit(make_request("long", token_ids, ref, max_tokens=3))
    with pytest.raises(ContextLengthExceededError):
        stepped.submit(make_request("short"), make_request("long", [*token_ids, 7], ref, max_tokens=2))
    assert stepped.is_idle(), "the short row of the refused request was queued"


def test_draining_engine_takes_no_rows_and_finishes_those_it_has(llama: Backbone) -> None:
    stepped = SteppedEngine(llama)
    stepped.submit(make_request("row"))
    stepped.engine.start_drain()
    with pytest.raises(DrainingError):
        stepped.submit(make_request("late"))
    stepped.finish()
    assert stepped.result("row").finish_reason == "length"


def test_memory_that_holds_no_row_is_refused_at_the_start(llama: Backbone) -> None:
    too_little = llama.max_model_len * llama.bytes_per_token - 1
    with pytest.raises(ValueError, match="of one row of max_model_len"):
        SteppedEngine(llama, kv_cache_bytes=too_little)


# --- what ends one row and no other ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (PromptCorruptError("the digest is not that of the file"), PromptCorruptError),
        (OSError("disk is gone"), UnavailableError),
        ("another k", PromptMismatchError),
    ],
)
def test_prompt_that_cannot_be_had_ends_its_own_rows_alone(
    llama: Backbone, answer: Exception | str, error: type[PromptmuxError]
) -> None:
    bad, good = make_ref("bad"), make_ref("good")
    stepped = with_prompts(llama, bad, good)
    sound = stepped.prompts[bad.prefix_key]
    wrong = make_prompt(llama, make_ref("bad", k=9), seed=0)
    stepped.prompts[bad.prefix_key] = answer if isinstance(answer, Exception) else wrong
    stepped.submit(
        make_request("bad-0", prompt=bad),
        make_request("good", prompt=good),
        make_request("bad-1", prompt=bad),
        make_request("bare"),
    )
    stepped.finish()
    for row_id in ("bad-0", "bad-1"):
        assert isinstance(stepped.result(row_id).error, error)
        assert stepped.tokens(row_id) == ()
    assert [stepped.result(row_id).finish_reason for row_id in ("good", "bare")] == ["length", "length"]
    assert stepped.is_idle()
    if isinstance(answer, Exception):  # what was read is kept by its digest; what could not be read is tried again
        stepped.prompts[bad.prefix_key] = sound
        assert stepped.run(make_request("again", prompt=bad)).finish_reason == "length"


def test_cold_prompt_delays_only_its_own_rows(llama: Backbone) -> None:
    cold = make_ref("cold")
    stepped = with_prompts(llama, cold)
    stepped.submit(make_request("cold", prompt=cold), make_request("bare"))
    for _ in range(5):
        stepped.turn(load=False)
    assert stepped.result("bare").finish_reason == "length"
    assert stepped.outputs["cold"] == []
    stepped.finish()
    assert stepped.result("cold").finish_reason == "length"


def take_anothers_prefix(stepped: SteppedEngine, row_id: str, other_id: str) -> None:
    rows = stepped.engine._rows
    rows[row_id].prefix, rows[other_id].prefix = rows[other_id].prefix, rows[row_id].prefix


def take_anothers_pages(stepped: SteppedEngine, row_id: str, other_id: str) -> None:
    rows = stepped.engine._rows
    rows[row_id].pages, rows[other_id].pages = rows[other_id].pages, rows[row_id].pages


def be_given_anothers_prefix_at_admission(stepped: SteppedEngine, row_id: str, other_id: str) -> None:
    """Rows and ledger agree with each other; what the requests named is all that tells."""
    take_anothers_prefix(stepped, row_id, other_id)
    for name in (row_id, other_id):
        row = stepped.engine._rows[name]
        assert row.pages is not None
        assert row.prefix is not None
        assert row.prefix.tail is not None
        stepped.engine._pool.write_tail(int(row.pages.numbers[0]), row.prefix.tail, row.serial, row.prefix.uid)


@pytest.mark.parametrize("damage", [take_anothers_prefix, take_anothers_pages, be_given_anothers_prefix_at_admission])
def test_rows_whose_prefixes_or_pages_are_exchanged_end_with_an_error_and_no_token(
    llama: Backbone, damage: Callable[[SteppedEngine, str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    refs = [make_ref(key) for key in "ab"]
    stepped = with_prompts(llama, *refs)
    alone = stepped.run(make_request("alone", max_tokens=6))
    stepped.submit(*(make_request(ref.prefix_key, prompt=ref, max_tokens=6) for ref in refs))
    stepped.submit(make_request("bare", max_tokens=6))
    stepped.turns_until(lambda: all(stepped.tokens(ref.prefix_key) for ref in refs))
    given = [stepped.tokens(ref.prefix_key) for ref in refs]
    damage(stepped, refs[0].prefix_key, refs[1].prefix_key)
    with caplog.at_level(logging.CRITICAL):
        stepped.finish()
    for ref, tokens in zip(refs, given, strict=True):
        result = stepped.result(ref.prefix_key)
        assert isinstance(result.error, IsolationError)
        assert result.token_ids == tokens, "a token was delivered after the damage"
    assert stepped.count("isolation_violations_total") == 2
    assert "isolation violation" in caplog.text
    assert stepped.result("bare").token_ids == alone.token_ids


# --- prompts come and go --------------------------------------------------------------------------------------------


def room_for_two(backbone: Backbone) -> dict[str, int]:
    """Two prompts of a page each, one of which may be pinned."""
    return {"max_virtual_tokens": 16, "prefix_cache_bytes": 2 * 16 * backbone.bytes_per_token}


def test_pinned_prompts_come_without_a_row_and_stay_when_others_are_evicted(llama: Backbone) -> None:
    refs = [make_ref(key, k=16) for key in "abcd"]
    stepped = with_prompts(llama, *refs, **room_for_two(llama))
    stepped.engine.pin(refs[:1])
    stepped.turn()
    stepped.turn()
    assert stepped.engine.residency(refs[0].prefix_key) == "device"
    for ref in refs[1:]:
        stepped.run(make_request(ref.prefix_key, prompt=ref))
    assert stepped.engine.residency(refs[0].prefix_key) == "device"
    assert stepped.engine.residency(refs[2].prefix_key) == "host"
    assert stepped.engine.status().prompts_resident == 2
    assert stepped.count("prompt_cache_misses_total", tier="device") == 3, "a pin is no row's miss"


def test_pinned_prompt_comes_back_from_the_host(llama: Backbone) -> None:
    one, *others = (make_ref(key, k=16) for key in "abc")
    stepped = with_prompts(llama, one, *others, **room_for_two(llama))
    for ref in (one, *others):
        stepped.run(make_request(ref.prefix_key, prompt=ref))
    assert stepped.engine.residency(one.prefix_key) == "host"
    stepped.engine.pin([one])
    stepped.turn()
    assert stepped.engine.residency(one.prefix_key) == "device"


def test_deleted_prompt_serves_the_rows_that_were_submitted_before(llama: Backbone) -> None:
    ref = make_ref("a")
    stepped = with_prompts(llama, ref, max_rows=1)
    alone = stepped.run(make_request("alone", prompt=ref))
    stepped.submit(make_request("runs", prompt=ref), make_request("waits", prompt=ref))
    stepped.turn()
    stepped.engine.evict(ref.prefix_key)
    stepped.prompts[ref.prefix_key] = FileNotFoundError("the version is deleted")
    stepped.finish()
    assert stepped.tokens("runs") == stepped.tokens("waits") == alone.token_ids
    stepped.turn()
    assert stepped.engine.residency(ref.prefix_key) == "store"
    assert stepped.engine.status().prompts_resident == 0


# --- outputs and status ---------------------------------------------------------------------------------------------


def test_all_rows_of_a_step_are_handed_over_in_one_call(llama: Backbone) -> None:
    stepped = SteppedEngine(llama)
    stepped.submit(*(make_request(f"row-{i}") for i in range(5)))
    stepped.turns_until(lambda: stepped.num_deliveries > 0)
    assert stepped.num_deliveries == 1
    assert all(len(outputs) == 1 for outputs in stepped.outputs.values())


def test_status_and_metrics_count_what_there_is(llama: Backbone) -> None:
    stepped = SteppedEngine(llama, max_rows=2)
    assert stepped.engine.status().failure is None
    stepped.submit(*(make_request(f"row-{i}", max_tokens=3) for i in range(3)))
    assert stepped.engine.status().num_waiting == 3
    stepped.turn()
    status = stepped.engine.status()
    num_pages = (8 << 20) // (16 * llama.bytes_per_token)
    assert (status.num_running, status.num_waiting) == (2, 1)
    assert status.kv_usage_ratio == 2 / num_pages
    assert 0.0 <= status.heartbeat_age_s < WAIT_S
    stepped.finish()
    assert stepped.is_idle()
    assert stepped.turn() is False, "nothing is left to do"
    assert stepped.count("generation_tokens_total") == 9
    assert stepped.count("prompt_tokens_total") == 9
    assert stepped.count("request_success_total", finish_reason="length") == 3


def test_rows_are_left_out_of_steps_only_where_a_step_takes_the_longer_the_more_tokens_it_has(llama: Backbone) -> None:
    assert SteppedEngine(llama).engine._scheduler._has_express_steps == (llama.device.type == "cpu")
