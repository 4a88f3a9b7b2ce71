"""A row in a mixed batch is given what PEFT gives it alone: every prompt kind, every family, prefill whole or cut."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch

from prompt_store.errors import PromptMismatch
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import RowOutput
from server.metrics import Metrics
from tests.factories import CONFIGS, SLIDING_WINDOW, load_model, read_prompt, save_prompt
from tests.integration.isolation.driver import RowResult
from tests.integration.isolation.world import DENSE, PACKED, World

FAMILIES = tuple(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_in_a_mixed_batch_equals_peft_and_its_batch_of_one(family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    cases = world.cases(seed=1)
    with world.driver() as driver:
        driver.make_resident()
        results = driver.run(cases)
        assert driver.count("batch_rows_sum") > driver.count("batch_rows_count") * len(cases) / 3
    assert world.differences(cases, results) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_row_whose_prompt_is_computed_in_chunks_beside_decoding_rows_equals_peft(
    family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    cases = world.cases(seed=2)
    with world.driver(max_rows=len(cases), max_step_tokens=len(cases) + 6, prefill_chunk=7) as driver:
        driver.make_resident()
        results = driver.run(cases)
        num_steps = driver.count("step_seconds_count", phase="forward")
    assert num_steps > max(case.max_tokens for case in cases) + 150 // 7
    assert world.differences(cases, results) == []


@pytest.mark.parametrize("family", PACKED)
def test_packed_families_run_packed(family: str, world_of: Callable[[str], World]) -> None:
    assert world_of(family).backbone.path == "packed"


@pytest.mark.parametrize("family", DENSE)
def test_families_with_attention_of_their_own_run_dense(family: str, world_of: Callable[[str], World]) -> None:
    assert world_of(family).backbone.path == "dense"


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_rows_are_longer_than_the_sliding_window(family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    assert world.backbone.model.config.sliding_window == SLIDING_WINDOW
    prompts = [prompt.ref.num_virtual_tokens for prompt in world.prompts.values()]
    assert min(prompts) < SLIDING_WINDOW < max(prompts)
    assert any(len(case.token_ids) > 2 * SLIDING_WINDOW for case in world.cases(seed=1))


def test_peft_alone_needs_to_be_told_of_falcons_one_shared_head(
    world_of: Callable[[str], World], tmp_path: Path
) -> None:
    world = world_of("falcon")
    base = load_model(world.folder)
    folder = save_prompt(world.folder, "prefix", 4, tmp_path / "prefix", seed=0, base=base)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        peft.PeftModel.from_pretrained(base, str(folder))(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(PromptMismatch, match="heads"):
        read_prompt("prefix", folder, world.backbone.shape(64))


def test_rows_of_few_and_of_many_pages_share_a_step(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    cases = world.cases(seed=3)
    with world.driver() as driver:
        driver.make_resident()
        driver.submit(cases)
        driver.step()
        num_pages = {row.pages.num_pages for row in driver.engine._scheduler.running if row.pages is not None}
        assert min(num_pages) == 1
        assert max(num_pages) > 8
        results = driver.finish()
    assert world.differences(cases, results) == []


def test_started_engine_on_its_own_thread_gives_the_same(world_of: Callable[[str], World]) -> None:
    world = world_of("qwen3")
    cases = world.cases(seed=4)
    results = {case.row_id: RowResult() for case in cases}
    all_ended = threading.Event()

    def deliver(outputs: Sequence[RowOutput]) -> None:
        for output in outputs:
            results[output.row_id].add(output)
        if all(result.has_ended for result in results.values()):
            all_ended.set()

    with world.driver() as driver:
        requests = [driver.request(case) for case in cases]
    by_key = {prompt.ref.prefix_key: prompt.soft_prompt for prompt in world.prompts.values()}
    engine = Engine(
        world.backbone, EngineConfig(kv_cache_bytes=64 << 20), Metrics(), lambda ref: by_key[ref.prefix_key]
    )
    engine.start(deliver)
    try:
        engine.submit(requests)
        assert all_ended.wait(60)
    finally:
        engine.stop(timeout_s=10)
    assert world.differences(cases, results) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_comparison_fails_when_two_rows_exchange_their_prompts(family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    exchanged = {"prompt-tuning": "twin", "twin": "prompt-tuning", "prefix": "prefix-twin", "prefix-twin": "prefix"}
    cases = [case for case in world.cases(seed=1) if case.prompt in exchanged]
    prompts = world.prompts | {name: world.prompts[other] for name, other in exchanged.items()}
    wrong = World(family, world.folder, world.backbone, prompts, world.oracle)
    with wrong.driver() as driver:
        results = driver.run(cases)
    for case in cases:
        assert world.differences([case], results) != [], f"{case.row_id} with {case.prompt} goes unnoticed"
