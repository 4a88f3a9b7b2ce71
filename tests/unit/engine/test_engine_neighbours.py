"""Rows that go wrong and the rows beside them: what breaks one leaves the others as they are, to the last bit."""

import dataclasses
import logging
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import RowOutput, RowRequest
from server.errors import EngineFailedError, NumericalError, PromptCorruptError, PromptMismatchError, TaskNotFoundError
from server.metrics import Metrics
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

QUESTION = (9, 8, 7, 6)
WAIT_S = 60.0
NO_PROMPT = SoftPrompt(kind="embeddings", values=np.zeros((0, 0), dtype=np.float32))


def test_seed_decides_a_sampled_row_whatever_shares_its_batch(llama: Backbone) -> None:
    def sampled(row_id: str, seed: int) -> RowRequest:
        return make_request(row_id, QUESTION, max_tokens=8, temperature=1.5, seed=seed)

    alone = SteppedEngine(llama)
    expected = alone.run(sampled("row", 5)).token_ids
    mixed = SteppedEngine(llama, max_rows=8, max_step_tokens=8)
    mixed.submit(*(sampled(f"early-{seed}", seed) for seed in range(5)), sampled("row", 5), sampled("other", 6))
    mixed.finish()

    assert mixed.tokens("row") == expected
    assert len({mixed.tokens(row_id) for row_id in mixed.outputs}) == 7, "each seed has tokens of its own"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_whose_memory_goes_bad_ends_and_its_neighbours_are_the_same_to_the_bit(llama: Backbone, bad: float) -> None:
    """Both runs lose the row in its third step, since the size of a product may change its last bits."""
    ref = make_ref("a", k=4, kind="prefix")
    prompts = {ref.prefix_key: make_prompt(llama, ref, seed=1)}

    def run(*, is_bad: bool) -> SteppedEngine:
        stepped = SteppedEngine(llama, prompts)
        stepped.submit(
            make_request("left", QUESTION, max_tokens=6, logprobs=3),
            make_request("sick", QUESTION, ref, max_tokens=3, logprobs=3),
            make_request("right", (5, 6), ref, max_tokens=6, logprobs=3),
        )
        rows = stepped.engine._rows
        stepped.turns_until(lambda: "sick" in rows and rows["sick"].num_generated + rows["sick"].num_pending == 2)
        pages = rows["sick"].pages
        assert pages is not None
        if is_bad:
            stepped.engine._pool.value_pages[1][int(pages.numbers[0]), :, 1] = bad
        stepped.finish()
        return stepped

    well, sick = run(is_bad=False), run(is_bad=True)
    assert well.result("sick").error is None
    assert isinstance(sick.result("sick").error, NumericalError)
    assert sick.tokens("sick") == well.tokens("sick")[:2]
    for row_id in ("left", "right"):
        assert sick.result(row_id) == well.result(row_id)
    assert sick.is_idle()


def test_prompt_that_failed_to_load_is_tried_again_for_the_next_row(llama: Backbone) -> None:
    ref = make_ref("a")
    stepped = SteppedEngine(llama, {ref.prefix_key: PromptCorruptError("a bit was flipped")})
    assert isinstance(stepped.run(make_request("first", prompt=ref)).error, PromptCorruptError)
    stepped.prompts[ref.prefix_key] = make_prompt(llama, ref, seed=1)

    assert stepped.run(make_request("second", prompt=ref)).finish_reason == "length"


def test_failed_load_of_one_version_ends_no_row_of_another_that_shares_its_file(llama: Backbone) -> None:
    """Both are filed under one key; the first to ask was deleted meanwhile."""
    deleted = make_ref("a")
    kept = dataclasses.replace(deleted, task="task-b", version=7)
    stepped = SteppedEngine(llama, {deleted.prefix_key: TaskNotFoundError("it was deleted")})
    stepped.submit(make_request("of-deleted", prompt=deleted), make_request("of-kept", prompt=kept))
    stepped.turns_until(lambda: bool(stepped.outputs["of-deleted"]))
    stepped.prompts[deleted.prefix_key] = make_prompt(llama, deleted, seed=1)
    stepped.finish()

    assert isinstance(stepped.result("of-deleted").error, TaskNotFoundError)
    assert stepped.result("of-kept").finish_reason == "length"


def test_pinned_prompt_that_fits_no_slot_disturbs_nobody(llama: Backbone) -> None:
    ref = make_ref("huge", k=llama.max_model_len + 1)
    stepped = SteppedEngine(llama, {ref.prefix_key: make_prompt(llama, ref, seed=1)})
    stepped.engine.pin([ref])
    stepped.turn(load=False)

    assert stepped.run(make_request("row")).finish_reason == "length"
    stepped.engine._prefixes.bring(ref)
    ((failed, error),) = stepped.engine._prefixes.compile_wanted(60.0)
    assert (failed, type(error)) == (ref, PromptMismatchError)
    assert "are allowed" in error.message
    assert stepped.engine.residency(ref.prefix_key) == "host"


def test_deliver_that_raises_is_a_failure_that_everyone_hears_of(
    llama: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows get their error through the same call, which may work again."""
    told: list[RowOutput] = []
    is_told = threading.Event()
    calls = iter(range(100))

    def deliver(outputs: Sequence[RowOutput]) -> None:
        if next(calls) == 0:
            raise OSError("nobody listens")
        told.extend(outputs)
        is_told.set()

    engine = Engine(llama, EngineConfig(audit_share=0.0, kv_cache_bytes=8 << 20), Metrics(), lambda ref: NO_PROMPT)
    with caplog.at_level(logging.CRITICAL, logger="server.engine.engine"):
        engine.start(deliver)
        try:
            engine.submit([make_request("row", max_tokens=50)])
            assert is_told.wait(WAIT_S)
        finally:
            engine.stop(WAIT_S)
    assert [(output.row_id, type(output.error)) for output in told] == [("row", EngineFailedError)]
    assert engine.status().failure == "OSError: nobody listens"


def test_prompt_deleted_between_its_arrival_and_its_compilation_is_not_made_from_memory(llama: Backbone) -> None:
    ref = make_ref("a")
    stepped = SteppedEngine(llama, {ref.prefix_key: make_prompt(llama, ref, seed=1)})
    prefixes = stepped.engine._prefixes
    prefixes.bring(ref)
    stepped.load()
    assert prefixes.poll() == ([], [])
    prefixes.evict(ref.prefix_key)
    stepped.prompts[ref.prefix_key] = PromptCorruptError("a bit was flipped")

    assert prefixes.acquire(ref) is None
    assert prefixes.compile_wanted(60.0) == []
    assert prefixes.residency_of(ref.prefix_key) == "store"
    stepped.load()
    ((failed,), _) = prefixes.poll()
    assert isinstance(failed.error, PromptCorruptError)
