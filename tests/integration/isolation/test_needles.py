"""One fixed row, the needle, at random places of random mixed batches: its output is that of its batch of one."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.integration.isolation.comparison import TOLERANCE_NATS, differences_from_alone, differences_from_oracle
from tests.integration.isolation.driver import Case
from tests.integration.isolation.world import World

pytestmark = pytest.mark.usefixtures("each_way")

NEEDLES = ("prompt-tuning", "multitask-2", "prefix", "long", None)


NUM_ROUNDS = 4


def haystack(world: World, rng: random.Random, round_index: int, num_rows: int) -> list[Case]:
    names = [*world.prompts, None]
    return [
        world.case(
            rng,
            f"hay-{round_index}-{i}",
            rng.choice(names),
            rng.randint(1, 50),
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 1.0]),
            tenant=rng.choice(["a", "b"]),
        )
        for i in range(num_rows)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "opt", "mixtral", "gpt_oss", "gptj"])
@pytest.mark.parametrize("name", NEEDLES)
def test_needle_equals_its_batch_of_one_in_any_haystack(
    name: str | None, family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    rng = random.Random(f"{family} {name}")
    needle = world.case(rng, "needle", name, rng.randint(1, 40), max_tokens=9, tenant="a")
    alone = world.alone(needle)
    assert differences_from_oracle(needle, alone, world.oracle) == []
    max_rows = rng.randint(4, 24)
    with world.driver(
        max_rows=max_rows, max_step_tokens=max_rows + rng.randint(8, 80), prefill_chunk=rng.randint(2, 40)
    ) as driver:
        driver.make_resident()
        for i in range(NUM_ROUNDS):
            before, beside = (haystack(world, rng, 2 * i + j, rng.randint(0, 10)) for j in range(2))
            here = replace(needle, row_id=f"needle-{i}")
            driver.submit(before)
            for _ in range(rng.randint(0, 4)):
                driver.step()
            beside.insert(rng.randint(0, len(beside)), here)
            driver.submit(beside)
            # The rest of the hay stays for the next round.
            found = driver.finish(here.row_id)[here.row_id]
            assert differences_from_alone(needle, found, alone, world.oracle) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_seeded_sampled_needle_draws_the_same_tokens_in_any_haystack(
    family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    needle = world.case(random.Random(8), "needle", "cartridge", 17, max_tokens=12, temperature=1.0, seed=1234)
    alone = world.alone(needle)
    greedy = world.alone(world.case(random.Random(8), "greedy", "cartridge", 17, max_tokens=12))
    assert alone.token_ids != greedy.token_ids
    for seed in range(5):
        with world.driver() as driver:
            driver.make_resident()
            hay = haystack(world, random.Random(seed), 0, 10)
            found = driver.run([*hay[:seed], needle, *hay[seed:]])["needle"]
        assert found.token_ids == alone.token_ids
        for one, other in zip(found.logprobs, alone.logprobs, strict=True):
            assert abs(one.logprob - other.logprob) <= TOLERANCE_NATS
