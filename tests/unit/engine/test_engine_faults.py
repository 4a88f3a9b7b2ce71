"""What goes wrong with one row, prompt or page ends that one and never the loop; what is deleted leaves nothing."""

import logging
from collections.abc import Callable

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.request import PromptRef
from server.errors import IsolationError, UnavailableError
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

LONG = tuple(range(20, 80))


def with_prompts(backbone: Backbone, *refs: PromptRef, **config: object) -> SteppedEngine:
    prompts = {ref.prefix_key: make_prompt(backbone, ref, seed=seed) for seed, ref in enumerate(refs)}
    return SteppedEngine(backbone, prompts, **config)


def kv_bytes(backbone: Backbone, num_pages: int) -> int:
    return num_pages * 16 * backbone.bytes_per_token


# --- faults ---------------------------------------------------------------------------------------------------------


def test_prompt_for_which_the_device_has_no_memory_ends_its_own_rows_alone(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = make_ref("large", k=40), make_ref("small", k=16)
    stepped = with_prompts(llama, large, small)
    forward = llama.forward

    def fail_when_large(pool: object, plan: object, *sampled: object) -> torch.Tensor:
        if plan.num_tokens == 40:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pool, plan, *sampled)  # type: ignore[arg-type]

    monkeypatch.setattr(llama, "forward", fail_when_large)
    stepped.submit(make_request("large", prompt=large), make_request("small", prompt=small), make_request("bare"))
    stepped.finish()
    assert isinstance(stepped.result("large").error, UnavailableError)
    assert [stepped.result(row_id).finish_reason for row_id in ("small", "bare")] == ["length", "length"]
    assert stepped.is_idle()


def be_cancelled(stepped: SteppedEngine) -> None:
    stepped.engine.cancel(["row-0"])


def give_way(stepped: SteppedEngine) -> None:
    stepped.turns_until(lambda: stepped.count("num_preemptions_total") > 0)


@pytest.mark.parametrize("leave", [be_cancelled, give_way])
def test_row_whose_pages_hold_another_text_than_its_own_leaves_none_and_the_others_go_on(
    llama: Backbone, leave: Callable[[SteppedEngine], None], caplog: pytest.LogCaptureFixture
) -> None:
    stepped = SteppedEngine(llama, kv_cache_bytes=kv_bytes(llama, 16))
    names = [f"row-{i}" for i in range(4)]
    stepped.submit(*(make_request(name, (i, *LONG), max_tokens=60) for i, name in enumerate(names)))
    stepped.turns_until(lambda: bool(stepped.tokens("row-0")))
    for row in stepped.engine._scheduler.running:
        row.token_ids[3] += 1
    with caplog.at_level(logging.CRITICAL):
        leave(stepped)
        stepped.finish()
    assert "its text is not kept: page" in caplog.text
    assert stepped.count("isolation_violations_total") > 0
    assert [stepped.result(name).finish_reason for name in names[1:]] == ["length"] * 3


def test_row_that_ends_because_of_its_prefix_does_not_end_the_loop(
    llama: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    ref = make_ref("a", k=20)
    stepped = with_prompts(llama, ref)
    stepped.submit(make_request("row", prompt=ref, max_tokens=9), make_request("bare", max_tokens=9))
    stepped.turns_until(lambda: bool(stepped.tokens("row")))
    prefix = stepped.engine._rows["row"].prefix
    assert prefix is not None
    prefix.num_users = 0
    with caplog.at_level(logging.CRITICAL):
        stepped.finish()
    assert isinstance(stepped.result("row").error, IsolationError)
    assert "its prefix is not its own" in caplog.text
    assert stepped.result("bare").finish_reason == "length"
    assert stepped.is_idle()


# --- waiting --------------------------------------------------------------------------------------------------------


def test_row_that_waits_for_pages_keeps_its_prefix_and_its_turn(llama: Backbone) -> None:
    """There is room for two prefixes. Rows behind ask for two others, and would fit where the first does not."""
    first, *others = (make_ref(key, k=16) for key in "abc")
    stepped = with_prompts(
        llama,
        first,
        *others,
        kv_cache_bytes=kv_bytes(llama, 16),
        max_virtual_tokens=16,
        prefix_cache_bytes=2 * 16 * llama.bytes_per_token,
        keeps_texts=False,
    )
    stepped.submit(make_request("long", LONG * 3, max_tokens=20), make_request("head", LONG * 2, first))
    for _ in range(3):
        stepped.turn()
    assert stepped.engine._rows["head"].prefix is not None, "it waits for pages alone"
    stepped.submit(*(make_request(ref.prefix_key, prompt=ref) for ref in others))
    stepped.turns_until(lambda: any(stepped.tokens(ref.prefix_key) for ref in others))
    assert stepped.tokens("head"), "a row behind it was first"
    stepped.finish()
    assert stepped.is_idle()


def test_row_that_is_cancelled_while_it_waits_for_pages_gives_its_prefix_back(llama: Backbone) -> None:
    ref = make_ref("a", k=16)
    stepped = with_prompts(llama, ref, kv_cache_bytes=kv_bytes(llama, 16))
    stepped.submit(make_request("long", LONG * 3, max_tokens=20), make_request("head", LONG * 2, ref))
    stepped.turns_until(lambda: stepped.engine._prefixes.device.num_users == 1)
    stepped.engine.cancel(["head", "long"])
    stepped.turn()
    assert stepped.is_idle()


# --- deletion -------------------------------------------------------------------------------------------------------


def test_row_in_flight_leaves_no_text_behind_a_deleted_prompt(llama: Backbone) -> None:
    ref = make_ref("a", k=20)
    stepped = with_prompts(llama, ref)
    stepped.submit(make_request("row", LONG, ref, max_tokens=20))
    stepped.turns_until(lambda: bool(stepped.tokens("row")))
    stepped.engine.evict(ref.prefix_key)
    stepped.finish()
    stepped.turn()
    assert stepped.engine._memory.texts.num_pages == 0
    assert stepped.engine._pool.ledger.num_used == 0


def pin(stepped: SteppedEngine, ref: PromptRef) -> None:
    stepped.engine.pin([ref])


def submit(stepped: SteppedEngine, ref: PromptRef) -> None:
    stepped.submit(make_request("new", prompt=ref))


@pytest.mark.parametrize("ask", [pin, submit])
@pytest.mark.parametrize("is_waited_for", [True, False])
def test_prompt_that_is_asked_for_after_its_deletion_stays(
    llama: Backbone, ask: Callable[[SteppedEngine, PromptRef], None], is_waited_for: bool
) -> None:
    """The same file was uploaded again, or another version has it."""
    ref = make_ref("a", k=20)
    stepped = with_prompts(llama, ref, max_rows=1)
    stepped.submit(*(make_request(f"row-{i}", prompt=ref) for i in range(1 + is_waited_for)))
    stepped.turns_until(lambda: bool(stepped.tokens("row-0")))
    stepped.engine.evict(ref.prefix_key)
    ask(stepped, ref)
    stepped.finish()
    stepped.turn()
    assert stepped.engine.residency(ref.prefix_key) == "device"
