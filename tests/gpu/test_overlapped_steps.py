"""The engine on a real CUDA device: overlapped steps give the tokens of steps apart, and no launch waits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.request import RowRequest
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REFS = [make_ref("a", k=20), make_ref("b", k=5, kind="prefix")]
PROMPTS = [None, *REFS]
LONG = tuple(range(20, 80))
KINDS: list[dict[str, Any]] = [
    {"max_tokens": 20},
    {"max_tokens": 12, "temperature": 1.0, "seed": 1, "top_p": 0.9, "logprobs": 3},
    {"max_tokens": 12, "temperature": 1.0, "seed": 2, "top_k": 5, "prompt_logprobs": 1},
    {"max_tokens": 20, "ignore_eos": False, "logit_bias": {2: 100.0}, "min_tokens": 4},
    {"max_tokens": 9, "temperature": 0.7, "seed": 3, "min_p": 0.05, "stop_token_ids": tuple(range(40, 60))},
]


@pytest.fixture(scope="module")
def llama_on_cuda(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cuda", max_model_len=256)


@pytest.fixture
def synchronising_is_an_error() -> Iterator[Callable[[str], None]]:
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def requests() -> list[RowRequest]:
    return [
        make_request(f"row-{i}", LONG[i : 2 * i + 5], PROMPTS[i % 3], **KINDS[i % len(KINDS)])  # type: ignore[arg-type]
        for i in range(12)
    ]


def make_engine(backbone: Backbone, *, overlaps: bool) -> SteppedEngine:
    prompts = {ref.prefix_key: make_prompt(backbone, ref, seed=seed) for seed, ref in enumerate(REFS)}
    return SteppedEngine(backbone, prompts, overlaps=overlaps, max_rows=8)


def test_overlapped_steps_give_the_tokens_of_steps_apart_and_of_rows_alone(llama_on_cuda: Backbone) -> None:
    engines = [make_engine(llama_on_cuda, overlaps=overlaps) for overlaps in (True, False)]
    for stepped in engines:
        stepped.submit(*requests())
        stepped.finish()
        assert stepped.count("isolation_violations_total") == 0
        assert stepped.is_idle()
    for request in requests():
        alone = make_engine(llama_on_cuda, overlaps=False).run(request)
        assert [stepped.tokens(request.row_id) for stepped in engines] == [alone.token_ids] * 2


def test_no_launch_waits_for_the_device(
    llama_on_cuda: Backbone,
    synchronising_is_an_error: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stepped = make_engine(llama_on_cuda, overlaps=True)
    # Prompts are compiled between steps, and may wait.
    stepped.engine.pin(REFS)
    stepped.turns_until(lambda: all(stepped.engine.residency(ref.prefix_key) == "device" for ref in REFS))
    pipeline, num_launches = stepped.engine._pipeline, 0
    launch = pipeline.launch

    def guarded(*args: Any) -> Any:
        nonlocal num_launches
        num_launches += 1
        synchronising_is_an_error("error")
        try:
            return launch(*args)
        finally:
            synchronising_is_an_error("default")

    monkeypatch.setattr(pipeline, "launch", guarded)
    stepped.submit(*requests())
    stepped.finish()
    assert num_launches > 20
