"""Rows join and leave between steps, prompts are evicted and come back, pages change hands: no output changes."""

import random
from collections.abc import Callable

import pytest

from server.engine.backbone import Backbone
from tests.integration.isolation.driver import Case, EngineDriver
from tests.integration.isolation.world import World

pytestmark = pytest.mark.usefixtures("each_way")

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "bloom")


def one_long_row_of_memory(backbone: Backbone) -> int:
    """The least that an engine accepts: one row of the whole context."""
    return backbone.max_model_len * backbone.bytes_per_token


def assert_nothing_is_left(driver: EngineDriver) -> None:
    status = driver.engine.status()
    assert (status.num_running, status.num_waiting, status.kv_usage_ratio) == (0, 0, 0.0)
    assert driver.engine._prefixes.device.num_users == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_leave_and_are_cancelled_do_not_change_the_others(
    family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    rng = random.Random(11)
    cases = world.cases(seed=5, max_tokens=10)
    names = [*world.prompts, None]
    with world.driver(max_rows=8, max_step_tokens=40, prefill_chunk=16) as driver:
        waiting = list(cases)
        doomed: list[str] = []
        while waiting or not all(result.has_ended for result in driver.results.values()):
            driver.submit([waiting.pop() for _ in range(min(len(waiting), rng.randint(0, 2)))])
            if rng.random() < 0.4 and waiting:
                row_id = f"doomed-{len(doomed)}"
                driver.submit([world.case(rng, row_id, rng.choice(names), rng.randint(1, 60), max_tokens=30)])
                doomed.append(row_id)
            if doomed and rng.random() < 0.5:
                driver.engine.cancel([rng.choice(doomed)])
            if not driver.step():
                driver.run_until(lambda: True)
        assert_nothing_is_left(driver)
        assert {driver.results[row_id].finish_reason for row_id in doomed} >= {"cancelled"}
    assert world.differences(cases, driver.results) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_and_reloaded_prompts_answer_as_before(family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    cases = [*world.cases(seed=6, max_tokens=4), *world.cases(seed=7, max_tokens=4)]
    with world.driver(
        max_rows=4,
        max_virtual_tokens=140,
        prefix_cache_bytes=288 * world.backbone.bytes_per_token,
        host_prompt_bytes=1 << 12,
        max_waiting_rows=128,
    ) as driver:
        results = driver.run(cases)
        assert driver.count("prompt_cache_evictions_total", tier="device") > 4
        assert driver.count("prompt_cache_evictions_total", tier="host") > 0
        assert driver.num_loads > len(world.prompts)
        assert_nothing_is_left(driver)
    assert world.differences(cases, results) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_wait_for_memory_and_take_over_poisoned_pages_are_unchanged(
    family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    cases = [*world.cases(seed=8, max_tokens=5), *world.cases(seed=9, max_tokens=5)]
    with world.driver(kv_cache_bytes=one_long_row_of_memory(world.backbone), max_waiting_rows=128) as driver:
        results = driver.run(cases)
        assert driver.most_rows < len(cases), "memory was never short"
        assert_nothing_is_left(driver)
    assert world.differences(cases, results) == []


def test_prompt_deleted_under_a_running_row_serves_it_to_the_end(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    rng = random.Random(3)
    cases = [world.case(rng, f"row-{name}", name, 9, max_tokens=10) for name in ("prompt-tuning", "prefix", "cpt")]
    with world.driver() as driver:
        driver.make_resident()
        driver.submit(cases)
        driver.run_until(lambda: all(driver.results[case.row_id].token_ids for case in cases))
        for case in cases:
            driver.engine.evict(world.prompts[case.prompt or ""].ref.prefix_key)
        driver.step()
        assert len(driver.engine._scheduler.running) == len(cases)
        results = driver.finish()
        assert driver.engine.residency(world.prompts["prefix"].ref.prefix_key) == "store"
    assert world.differences(cases, results) == []


def test_rollout_changes_only_rows_that_are_admitted_later(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    rng = random.Random(4)
    before = world.case(rng, "before", "prompt-tuning", 12, max_tokens=12)
    after = Case(row_id="after", prompt="twin", token_ids=before.token_ids, max_tokens=12)
    with world.driver() as driver:
        driver.submit([before])
        driver.run_until(lambda: len(driver.results["before"].token_ids) >= 3)
        driver.submit([after])
        results = driver.finish()
    assert world.differences([before, after], results) == []
    assert results["before"].token_ids != results["after"].token_ids
