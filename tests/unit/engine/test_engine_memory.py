"""Rows that share little memory: preempted and computed again, or begun where earlier ones left off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from server.engine.kernels.batch import PagedBatch
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

LONG = tuple(range(20, 80))
"""A client's text of several pages."""

PAGE_TOKENS = 16


def with_pages(backbone: Backbone, num_pages: int, **config: object) -> SteppedEngine:
    refs = {ref.prefix_key: make_prompt(backbone, ref, seed=seed) for seed, ref in enumerate(REFS)}
    return SteppedEngine(
        backbone, refs, kv_cache_bytes=num_pages * PAGE_TOKENS * backbone.bytes_per_token, max_rows=8, **config
    )


REFS = [make_ref("a", k=20), make_ref("b", k=20, kind="prefix")]


@pytest.mark.parametrize("keeps_texts", [True, False])
def test_rows_that_give_way_end_with_the_tokens_of_a_batch_of_one(llama: Backbone, keeps_texts: bool) -> None:
    """The pool holds the longest row once; eight rows grow to more than that together."""
    requests = [
        make_request(f"row-{i}", LONG[: 10 + i], prompt, max_tokens=40, tenant="ab"[i % 2])
        for i, prompt in enumerate([None, *REFS, None, *REFS, None, None])
    ]
    alone = {r.row_id: with_pages(llama, 64, keeps_texts=False).run(r).token_ids for r in requests}
    stepped = with_pages(llama, 16, keeps_texts=keeps_texts)
    stepped.submit(*requests)
    stepped.finish()
    assert stepped.count("num_preemptions_total") > 0, "memory was never short"
    assert {row_id: stepped.tokens(row_id) for row_id in alone} == alone
    assert stepped.is_idle()


def test_preempted_row_gives_its_prompts_logprobs_once_and_those_of_a_batch_of_one(llama: Backbone) -> None:
    def request(index: int) -> object:
        return make_request(f"row-{index}", LONG[index:], max_tokens=30, prompt_logprobs=2, logprobs=1)

    requests = [request(i) for i in range(5)]
    alone = [with_pages(llama, 64).run(r) for r in requests]  # type: ignore[arg-type]
    stepped = with_pages(llama, 16, prefill_chunk=7)
    stepped.submit(*requests)  # type: ignore[arg-type]
    stepped.finish()
    assert stepped.count("num_preemptions_total") > 0, "memory was never short"
    for index, expected in enumerate(alone):
        found = stepped.result(f"row-{index}")
        assert found.token_ids == expected.token_ids
        assert found.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        assert len(found.prompt_logprobs) == len(LONG) - index
        for one, other in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_row_that_gives_way_between_two_chunks_scores_its_prompt_once(llama: Backbone) -> None:
    request = make_request("row", range(5, 40), max_tokens=2, prompt_logprobs=0)
    expected = SteppedEngine(llama, prefill_chunk=8).run(request).prompt_logprobs
    stepped = SteppedEngine(llama, prefill_chunk=8)
    stepped.submit(request)
    for _ in range(3):
        stepped.turn()
    (row,) = stepped.engine._scheduler.running
    assert row.pending_prompt_logprobs, "nothing has been scored before it gives way"
    stepped.engine._scheduler._places.send_back(row)
    stepped.finish()
    found = stepped.result("row").prompt_logprobs
    assert found is not None
    assert expected is not None
    assert [entry and entry.token_id for entry in found] == [entry and entry.token_id for entry in expected]


def test_cancelled_row_that_was_preempted_leaves_nothing(llama: Backbone) -> None:
    stepped = with_pages(llama, 16)
    stepped.submit(*(make_request(f"row-{i}", LONG, max_tokens=60) for i in range(4)))
    stepped.turns_until(lambda: stepped.count("num_preemptions_total") > 0)
    stepped.engine.cancel([f"row-{i}" for i in range(4)])
    stepped.turn()
    assert stepped.is_idle()


@pytest.mark.parametrize("prompt", [None, *REFS], ids=["bare", "embeddings", "prefix"])
def test_row_that_begins_like_an_earlier_one_computes_the_rest_alone(llama: Backbone, prompt: object) -> None:
    stepped = with_pages(llama, 64)
    fresh = with_pages(llama, 64, keeps_texts=False)
    for name, text in (
        ("first", LONG),
        ("again", LONG),
        ("longer", (*LONG, 7, 8, 9)),
        ("other", (*LONG[:40], 7, 8, 9)),
    ):
        request = make_request(name, text, prompt)  # type: ignore[arg-type]
        assert stepped.run(request).token_ids == fresh.run(request).token_ids, name
    k = prompt.num_virtual_tokens if prompt is not None else 0  # type: ignore[attr-defined]
    # Whole pages of columns, the virtual tokens before them.
    cached = {name: sum(output.num_cached for output in outputs) for name, outputs in stepped.outputs.items()}
    assert cached["first"] == 0
    assert cached["again"] == (k + len(LONG) - 1) // PAGE_TOKENS * PAGE_TOKENS - k
    assert cached["longer"] == (k + len(LONG)) // PAGE_TOKENS * PAGE_TOKENS - k
    assert cached["other"] == (k + 40) // PAGE_TOKENS * PAGE_TOKENS - k
    assert stepped.count("prompt_tokens_cached_total") == sum(cached.values())


def test_answers_are_kept_for_the_next_turn_of_a_conversation(llama: Backbone) -> None:
    stepped = with_pages(llama, 64)
    answer = stepped.run(make_request("turn-1", LONG, max_tokens=30)).token_ids
    conversation = (*LONG, *answer, 5, 6)
    stepped.run(make_request("turn-2", conversation))
    # The answer's last token was never computed: nothing came after it.
    assert stepped.outputs["turn-2"][0].num_cached == (len(conversation) - 3) // PAGE_TOKENS * PAGE_TOKENS


@pytest.mark.parametrize(
    "change",
    [
        lambda: make_request("second", LONG, REFS[0], tenant="other"),
        lambda: make_request("second", LONG, REFS[1]),
        lambda: make_request("second", LONG),
        lambda: make_request("second", (19, *LONG[1:]), REFS[0]),
        lambda: make_request("second", LONG, REFS[0], prompt_logprobs=1),
    ],
    ids=["tenant", "prompt", "no prompt", "first token", "wants its prompt's logprobs"],
)
def test_text_of_another_tenant_prompt_or_beginning_is_not_shared(llama: Backbone, change: Callable) -> None:
    stepped = with_pages(llama, 64)
    stepped.run(make_request("first", LONG, REFS[0]))
    expected = with_pages(llama, 64, keeps_texts=False).run(change())
    assert stepped.run(change()).token_ids == expected.token_ids
    assert all(output.num_cached == 0 for output in stepped.outputs["second"])


def test_texts_computed_behind_a_deleted_prompt_are_dropped(llama: Backbone) -> None:
    stepped = with_pages(llama, 64)
    stepped.run(make_request("first", LONG, REFS[0]))
    assert stepped.engine._memory.texts.num_pages > 0
    stepped.engine.evict(REFS[0].prefix_key)
    stepped.turn()
    assert stepped.engine._memory.texts.num_pages == 0
    assert stepped.engine._pool.num_row_pages == 0


# --- deterministic --------------------------------------------------------------------------------------------------


def bits(stepped: SteppedEngine, row_id: str) -> list[tuple[int, float]]:
    return [(entry.token_id, entry.logprob) for entry in stepped.result(row_id).logprobs]


def needle_among(backbone: Backbone, num_others: int, *, is_deterministic: bool) -> list[tuple[int, float]]:
    stepped = with_pages(backbone, 128, is_deterministic=is_deterministic, prefill_chunk=24, max_step_tokens=64)
    others = [
        make_request(f"by-{i}", LONG[i : i + 5 + 7 * i], REFS[i % 2], max_tokens=3 + 5 * i, temperature=1.0, seed=i)
        for i in range(num_others)
    ]
    needle = make_request("needle", LONG, REFS[0], max_tokens=24, logprobs=0)
    stepped.submit(*others[:1], needle, *others[1:])
    stepped.finish()
    assert stepped.count("num_preemptions_total") == 0
    return bits(stepped, "needle")


def test_deterministic_row_has_the_same_bits_whatever_shares_the_batch(llama: Backbone) -> None:
    alone = needle_among(llama, 0, is_deterministic=True)
    for num_others in (1, 4, 7):
        assert needle_among(llama, num_others, is_deterministic=True) == alone


@pytest.fixture
def llama_that_listens(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A kernel whose answers move by a rounding error when the batch is another: what determinism must exclude."""
    attend = llama._context.kernel

    def attend_and_listen(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        batch: PagedBatch = rest[4]
        return attend(query, *rest) * (1 + 1e-6 * len(batch.lengths))

    monkeypatch.setattr(llama._context, "kernel", attend_and_listen)
    return llama


def test_row_whose_bits_depend_on_the_batch_is_seen_to(
    llama_that_listens: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse: the comparison above fails where there is something to find."""
    monkeypatch.setattr("server.engine.backbone.check_deterministic", lambda *args: True)
    alone = needle_among(llama_that_listens, 0, is_deterministic=True)
    assert needle_among(llama_that_listens, 7, is_deterministic=True) != alone


def test_backbone_whose_bits_depend_on_the_batch_is_not_served_as_deterministic(llama_that_listens: Backbone) -> None:
    with pytest.raises(BackboneError, match="depend on what shares its batch"):
        with_pages(llama_that_listens, 128, is_deterministic=True, prefill_chunk=24, max_step_tokens=64)
