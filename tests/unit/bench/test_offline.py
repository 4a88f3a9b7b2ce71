"""The engine in process answers a load as it answers anyone: every token, its own prompt, its own errors."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.bench.load import Answer
from server.bench.offline import OfflineEngine, OfflineTarget
from server.bench.workload import BenchRequest, RandomPrompts, Workload
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.request import RowOutput
from server.errors import ContextLengthExceededError, EngineFailedError

REQUESTS = [BenchRequest(prompt, tuple(range(5, 5 + n)), 6) for n, prompt in enumerate([0, 1, 2, None, 1], start=3)]


@pytest.fixture(scope="module")
def llama(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu", max_model_len=128)


@pytest.fixture(scope="module")
def prompts(llama: Backbone) -> RandomPrompts:
    weight: Any = llama.model.get_input_embeddings().weight
    return RandomPrompts(weight.detach().numpy(), num_prompts=3, k=4, seed=1)


@pytest.fixture
def engine(llama: Backbone) -> Iterator[OfflineEngine]:
    with OfflineEngine(llama, EngineConfig(max_rows=4, max_waiting_rows=8, kv_cache_bytes=4 << 20)) as engine:
        yield engine


def ask(engine: OfflineEngine, prompts: RandomPrompts, *requests: BenchRequest) -> list[Answer]:
    async def run() -> list[Answer]:
        target = OfflineTarget(engine, prompts)
        return await asyncio.gather(*(target.answer(request) for request in requests))

    return asyncio.run(run())


def test_every_token_has_its_time(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    answers = ask(engine, prompts, *REQUESTS)

    assert [answer.failure for answer in answers] == [None] * len(REQUESTS)
    for answer in answers:
        assert len(answer.token_times_s) == 6
        assert all(a < b for a, b in pairwise(answer.token_times_s))
        assert answer.token_times_s[-1] == answer.ended_s


def test_tokens_that_were_kept_from_an_earlier_request_are_counted(
    engine: OfflineEngine, prompts: RandomPrompts
) -> None:
    request = BenchRequest(0, tuple(range(5, 55)), 4)
    first, again = (ask(engine, prompts, request)[0] for _ in range(2))

    assert (first.failure, again.failure) == (None, None)
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens > 0


def test_a_request_answers_with_its_own_prompt(llama: Backbone, engine: OfflineEngine, prompts: RandomPrompts) -> None:
    import torch

    tokens = engine.run(Workload(prompts, REQUESTS))

    for request, found in zip(REQUESTS, tokens, strict=True):
        ids = list(request.token_ids)
        vectors = torch.from_numpy(np.array(prompts[request.prompt])) if request.prompt is not None else None
        for token in found:
            # The reference path: the row alone, its vectors in front, the model's own attention.
            logits = llama.reference(ids, vectors=vectors, num_logits=1)
            assert int(logits[-1].argmax()) == token
            ids.append(token)


def test_forgotten_prefixes_are_compiled_again(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    load = Workload(prompts, REQUESTS)
    first = engine.run(load)
    loads = engine.metrics.registry.get_sample_value

    assert loads("promptmux_prompt_load_seconds_count") == 3
    engine.run(load)
    assert loads("promptmux_prompt_load_seconds_count") == 3
    engine.forget_prefixes()
    assert engine.run(load) == first
    assert loads("promptmux_prompt_load_seconds_count") == 6


def test_what_the_engine_refuses_is_an_answer_of_a_load(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    (answer,) = ask(engine, prompts, BenchRequest(0, (5,), 500))

    assert answer.failure is not None
    assert (answer.failure.kind, answer.failure.status) == ("context_length_exceeded", 400)
    assert not answer.token_times_s


def test_what_the_engine_refuses_is_raised_by_a_run(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    with pytest.raises(ContextLengthExceededError):
        engine.run(Workload(prompts, [BenchRequest(0, (5,), 500)]))
    assert engine.run(Workload(prompts, REQUESTS[:1])) != [[]]


def test_more_than_may_wait_is_refused_and_the_rest_is_answered(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    answers = ask(engine, prompts, *(BenchRequest(None, (5, 6), 4) for _ in range(200)))

    kinds = [answer.failure.kind if answer.failure is not None else None for answer in answers]
    assert set(kinds) == {None, "queue_full"}
    assert all(
        len(answer.token_times_s) == (4 if kind is None else 0) for answer, kind in zip(answers, kinds, strict=True)
    )


class DeafEngine(OfflineEngine):
    """Nothing that the engine hands over arrives, and the engine ends of it."""

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        raise RuntimeError("deaf")


def test_an_engine_that_ends_without_a_word_is_not_waited_for(llama: Backbone, prompts: RandomPrompts) -> None:
    config = EngineConfig(max_rows=4, max_waiting_rows=8, kv_cache_bytes=4 << 20)
    with DeafEngine(llama, config) as engine, pytest.raises(EngineFailedError, match="deaf"):
        engine.run(Workload(prompts, REQUESTS))
    with DeafEngine(llama, config) as engine:
        (answer,) = ask(engine, prompts, REQUESTS[0])
    assert answer.failure is not None
    assert answer.failure.kind == "engine_failed"


def test_a_loop_that_is_gone_does_not_stop_the_engine(engine: OfflineEngine, prompts: RandomPrompts) -> None:
    async def leave() -> None:
        target = OfflineTarget(engine, prompts)
        task = asyncio.create_task(target.answer(BenchRequest(None, (5,), 100)))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())

    assert [len(tokens) for tokens in engine.run(Workload(prompts, REQUESTS))] == [6] * len(REQUESTS)
    assert any(thread.name == "engine" for thread in threading.enumerate())
