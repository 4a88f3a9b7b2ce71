"""Overlapped steps: a step is launched before the one before it is looked at, and no row can tell.

The engine's other tests run both ways (`each_way`); here is what only overlapped steps can get wrong.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine import forward
from server.engine.backbone import Backbone
from server.engine.cuda_graphs import take_sampled
from server.engine.pages import PAGE_SIZE
from server.engine.request import RowOutput, RowRequest
from server.engine.row import Row
from server.engine.sampler import DeviceSample
from server.errors import IsolationError
from tests.unit.engine.no_waiting import WaitedError, no_waiting
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

EOS = 2
LONG = tuple(range(20, 80))
REFS = [make_ref("a", k=20), make_ref("b", k=5, kind="prefix")]


def make_engine(backbone: Backbone, *, overlaps: bool, **config: Any) -> SteppedEngine:
    prompts = {ref.prefix_key: make_prompt(backbone, ref, seed=seed) for seed, ref in enumerate(REFS)}
    return SteppedEngine(backbone, prompts, overlaps=overlaps, **config)


def all_kinds() -> list[RowRequest]:
    """Rows that end in every way, sample in every way, and want everything."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 9},
        {"max_tokens": 1},
        {"max_tokens": 0, "prompt_logprobs": 2},
        {"max_tokens": 7, "logprobs": 3, "prompt_logprobs": 1},
        {"max_tokens": 12, "ignore_eos": False, "logit_bias": {EOS: 100.0}, "min_tokens": 3},
        {"max_tokens": 12, "ignore_eos": False, "temperature": 2.0, "seed": 5, "logit_bias": {EOS: 4.0}},
        {"max_tokens": 12, "temperature": 1.0, "seed": 6, "top_p": 0.9, "stop": ("a", "b", "c", "7")},
        {"max_tokens": 12, "temperature": 1.5, "seed": 7, "top_k": 9, "stop_token_ids": tuple(range(40, 70))},
        {"max_tokens": 9, "temperature": 1.0, "seed": 8, "min_p": 0.02, "logprobs": 0},
    ]
    prompts = [None, *REFS]
    return [
        make_request(f"row-{i}", LONG[i : 2 * i + 3 + 9 * (i % 3)], prompts[i % 3], tenant="ab"[i % 2], **fields)
        for i, fields in enumerate(kinds)
    ]


def penalised() -> RowRequest:
    return make_request("penalised", LONG[:9], max_tokens=10, repetition_penalty=1.5, presence_penalty=0.5, logprobs=1)


def assert_same(found: RowOutput, expected: RowOutput) -> None:
    for name in ("row_id", "text", "token_ids", "finish_reason", "stop_reason", "error"):
        assert getattr(found, name) == getattr(expected, name), name
    for one, other in zip(
        (*found.logprobs, *(found.prompt_logprobs or ())),
        (*expected.logprobs, *(expected.prompt_logprobs or ())),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.token_id == other.token_id
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("config", [{}, {"prefill_chunk": 5}, {"max_rows": 3}, {"is_deterministic": True}])
@pytest.mark.parametrize("with_penalties", [False, True])
def test_rows_of_all_kinds_get_what_they_get_alone_step_by_step(
    llama: Backbone, config: dict[str, Any], with_penalties: bool
) -> None:
    requests = [*all_kinds(), *([penalised()] if with_penalties else [])]
    alone = make_engine(llama, overlaps=False, **config)
    stepped = make_engine(llama, overlaps=True, **config)
    stepped.submit(*requests)
    stepped.finish()
    for request in requests:
        alone.run(request)
        assert_same(stepped.result(request.row_id), alone.result(request.row_id))
    reasons = {stepped.result(request.row_id).finish_reason for request in requests}
    assert reasons == {"stop", "length"}
    assert stepped.is_idle()
    assert stepped.count("isolation_violations_total") == 0


class Diary:
    """Notes when steps are launched and when their tokens are read."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        run, read = backbone.forward, DeviceSample.to_host

        def note_launch(*args: Any) -> torch.Tensor:
            self.events.append("launch")
            return run(*args)

        def note_read(sample: DeviceSample) -> Any:
            self.events.append("read")
            return read(sample)

        monkeypatch.setattr(backbone, "forward", note_launch)
        monkeypatch.setattr(DeviceSample, "to_host", note_read)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = make_engine(llama, overlaps=True)
    diary = Diary(llama, monkeypatch)
    stepped.run(make_request("row", max_tokens=4))
    # No step comes behind the last token: its length is known without it.
    assert diary.events == ["launch", *["launch", "read"] * 3, "read"]


def test_steps_that_do_not_overlap_are_read_at_once(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = make_engine(llama, overlaps=False)
    diary = Diary(llama, monkeypatch)
    stepped.run(make_request("row", max_tokens=4))
    assert diary.events == ["launch", "read"] * 4


def test_row_whose_penalties_read_its_tokens_waits_for_them_behind_the_pass(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = make_engine(llama, overlaps=True)
    diary = Diary(llama, monkeypatch)
    stepped.run(penalised())
    # Read once for the penalties of the next token, and again, from the host's memory, to deliver it.
    assert diary.events == ["launch", *["launch", "read", "read"] * 9, "read"]


@pytest.fixture
def llama_without_attention(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The CPU's kernels run on the host and read their tensors; what surrounds them is what runs beside a device."""

    def only_write(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        key, value, key_pages, value_pages, batch, _ = rest
        pages, offsets = batch.write_slots // PAGE_SIZE, batch.write_slots % PAGE_SIZE
        key_pages[pages, :, offsets] = key
        value_pages[pages, :, offsets] = value
        return query * 0.5

    monkeypatch.setattr(llama._context, "kernel", only_write)
    return llama


def everything_asked_for() -> list[RowRequest]:
    return [*all_kinds(), make_request("sorted", LONG, max_tokens=5, temperature=1.0, top_p=0.999, seed=1)]


def test_nothing_waits_for_the_device_between_scheduling_and_collecting(
    llama_without_attention: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.truncation.NUM_RANKED", 8)
    stepped = make_engine(llama_without_attention, overlaps=True, prefill_chunk=7, audit_share=1.0)
    pipeline, num_guarded = stepped.engine._pipeline, 0

    def guarded(do: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal num_guarded
            num_guarded += 1
            with no_waiting():
                return do(*args)

        return run

    monkeypatch.setattr(pipeline, "plan", guarded(pipeline.plan))
    monkeypatch.setattr(pipeline, "launch", guarded(pipeline.launch))
    stepped.submit(*everything_asked_for())
    stepped.finish()
    assert num_guarded > 20
    assert all(stepped.result(request.row_id).error is None for request in everything_asked_for())


def test_a_step_that_waits_is_seen_to(llama_without_attention: Backbone) -> None:
    stepped = make_engine(llama_without_attention, overlaps=False)
    stepped.submit(make_request("row"))
    with pytest.raises(WaitedError), no_waiting():
        stepped.engine.run_once()


def test_tokens_taken_at_the_wrong_places_are_caught_by_the_comparison(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is right, the gather is not: the check cannot see it, a batch of one can."""

    def take_neighbours(token_ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        return take_sampled(token_ids, sources, sampled.roll(1))

    def tokens(overlaps: bool) -> list[tuple[int, ...]]:
        stepped = make_engine(llama, overlaps=overlaps)
        requests = [make_request(f"row-{i}", LONG[i : i + 5], max_tokens=6) for i in range(4)]
        stepped.submit(*requests)
        stepped.finish()
        assert stepped.count("isolation_violations_total") == 0
        return [stepped.tokens(request.row_id) for request in requests]

    expected = tokens(overlaps=False)
    monkeypatch.setattr(forward, "take_sampled", take_neighbours)
    found = tokens(overlaps=True)
    # The first token comes from the prompt, which the host knows.
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert all(one != other for one, other in zip(found, expected, strict=True))


def running_row(stepped: SteppedEngine, row_id: str) -> Row:
    row = stepped.engine._rows[row_id]
    assert row.num_pending == 1, "no token is on its way"
    return row


def test_rows_that_are_told_each_others_places_end_without_a_token(llama: Backbone) -> None:
    stepped = make_engine(llama, overlaps=True)
    stepped.submit(*(make_request(f"row-{i}", LONG[i : i + 5], max_tokens=6) for i in range(3)))
    stepped.turns_until(lambda: len(stepped.tokens("row-0")) == 2)
    one, other = running_row(stepped, "row-0"), running_row(stepped, "row-2")
    one.sample_place, other.sample_place = other.sample_place, one.sample_place
    stepped.finish()
    for row_id in ("row-0", "row-2"):
        assert isinstance(stepped.result(row_id).error, IsolationError)
        assert len(stepped.tokens(row_id)) == 2
    assert stepped.result("row-1").finish_reason == "length"
    assert stepped.count("isolation_violations_total") == 2
    assert stepped.is_idle()


def test_cancelled_row_gets_no_token_that_is_on_its_way_and_gives_everything_back(llama: Backbone) -> None:
    stepped = make_engine(llama, overlaps=True, keeps_texts=False)
    stepped.submit(make_request("row", LONG, REFS[0], max_tokens=50), make_request("other", max_tokens=5))
    stepped.turns_until(lambda: len(stepped.tokens("row")) == 3)
    running_row(stepped, "row")
    stepped.engine.cancel(["row"])
    stepped.turn()
    assert stepped.result("row").finish_reason == "cancelled"
    assert len(stepped.tokens("row")) == 3
    stepped.finish()
    assert stepped.is_idle()


def test_pages_of_a_row_that_has_ended_serve_another_while_its_last_step_is_in_flight(llama: Backbone) -> None:
    """Freed pages are poisoned, and there is room for one row: the second takes over what the first still used."""
    num_pages = -(-llama.max_model_len // 16)
    room = {"kv_cache_bytes": num_pages * 16 * llama.bytes_per_token, "keeps_texts": False}
    first = make_request("first", range(3, 120), max_tokens=20, ignore_eos=False, logit_bias={EOS: 100.0})
    second = make_request("second", range(5, 100), REFS[0], max_tokens=8)
    alone = make_engine(llama, overlaps=False).run(second)
    stepped = make_engine(llama, overlaps=True, **room)
    stepped.submit(first, second)
    stepped.finish()
    assert stepped.result("first").token_ids == (EOS,)
    assert_same(stepped.result("second"), alone)


def test_text_behind_the_end_of_a_row_is_not_kept(llama: Backbone) -> None:
    """The row ends with a full page; the step that was launched meanwhile writes into the next one."""
    text = LONG[:15]
    stepped = make_engine(llama, overlaps=True)
    free = make_engine(llama, overlaps=False).run(make_request("free", text, max_tokens=4)).token_ids
    stepped.run(make_request("row", text, max_tokens=9, stop_token_ids=(free[2],)))
    stepped.turn()
    cached = {}
    for name, tokens in (("same", (*text, *free[:2])), ("other", (*text[:-1], 7, 8))):
        stepped.run(make_request(name, (*tokens, *LONG)))
        cached[name] = stepped.outputs[name][0].num_cached
    assert cached == {"same": 16, "other": 0}


def test_backbone_on_the_dense_path_takes_its_tokens_from_the_host(
    tiny_backbone_folder: Callable[[str], Any],
) -> None:
    backbone = Backbone.load(str(tiny_backbone_folder("gptj")), dtype="float32", device="cpu", max_model_len=256)
    stepped = SteppedEngine(backbone, overlaps=True)
    assert not stepped.engine._pipeline.overlaps
    assert len(stepped.run(make_request("row", max_tokens=3)).token_ids) == 3


def test_steps_overlap_where_the_device_is_another_than_the_host_unless_told_otherwise(llama: Backbone) -> None:
    is_cuda = llama.device.type == "cuda"
    assert SteppedEngine(llama, overlaps=None).engine._pipeline.overlaps == is_cuda
    assert SteppedEngine(llama, overlaps=True).engine._pipeline.overlaps
