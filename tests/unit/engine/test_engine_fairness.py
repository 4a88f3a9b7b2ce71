"""Steps that are kept short for a small tenant's sake, on the real engine: they change when, and never what."""

import pytest

from server.engine.backbone import Backbone
from server.engine.request import RowRequest
from server.engine.step_times import StepTimes
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

REF = make_ref("a", k=4, kind="prefix")
TEXTS = [tuple(range(5, 5 + length)) for length in (3, 40, 9, 70, 17, 5, 30, 21)]


@pytest.fixture
def costly_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are said to take a tenth of what a step takes by itself, whatever is measured."""
    monkeypatch.setattr(StepTimes, "is_known", True)
    monkeypatch.setattr(StepTimes, "base_s", 1.0)
    monkeypatch.setattr(StepTimes, "of", lambda self, num_rows, num_tokens: 1 + 0.1 * num_rows + 0.02 * num_tokens)


def flood_request(number: int) -> RowRequest:
    ref = REF if number % 2 else None
    return make_request(f"flood-{number}", TEXTS[number % 8], ref, tenant="flood", max_tokens=12, seed=number)


def calm_request(number: int) -> RowRequest:
    return make_request(f"calm-{number}", TEXTS[number], tenant="calm", max_tokens=5, seed=number)


@pytest.mark.usefixtures("costly_rows")
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_rows_have_the_tokens_of_their_batch_of_one_however_short_steps_are_kept(
    llama: Backbone, is_deterministic: bool
) -> None:
    prompts = {REF.prefix_key: make_prompt(llama, REF, seed=1)}
    stepped = SteppedEngine(
        llama, prompts, max_rows=10, max_step_tokens=60, prefill_chunk=32, is_deterministic=is_deterministic
    )
    requests = [flood_request(number) for number in range(6 if is_deterministic else 16)]
    stepped.submit(*requests)
    for number in range(4):
        request = calm_request(number)
        requests.append(request)
        stepped.submit(request)
        while not stepped.has_ended(request.row_id):
            stepped.turn()
    stepped.finish()

    alone = SteppedEngine(llama, prompts, is_deterministic=is_deterministic, prefill_chunk=32, keeps_texts=False)
    for request in requests:
        assert stepped.tokens(request.row_id) == alone.run(request).token_ids
    assert stepped.is_idle()
    assert stepped.count("isolation_violations_total") == 0
    num_limited, num_express = (stepped.count("steps_total", form=form) for form in ("limited", "express"))
    if is_deterministic or llama.device.type != "cpu":
        assert (num_limited, num_express) == (0, 0)
    else:
        assert num_limited > 10
        assert num_express >= 2


def test_engine_learns_how_long_its_steps_take(llama: Backbone) -> None:
    stepped = SteppedEngine(llama)
    stepped.run(make_request("row", max_tokens=30))
    times = stepped.engine._scheduler.step_times
    assert times.is_known
    assert 0 < times.of(1, 1) < 1.0
    assert stepped.count("steps_total", form="full") >= 30
