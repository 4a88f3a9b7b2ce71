"""A prompt whose numbers overflow ends its own rows with an error; the neighbours' outputs keep every bit."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prompt_store.manifest import SoftPrompt
from server.errors import NumericalError
from tests.factories import MadePrompt
from tests.integration.isolation.driver import Case, RowResult
from tests.integration.isolation.world import World

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "opt", "gptj", "falcon")
"""Not mixtral and gpt_oss: which expert a token goes to decides the shape, and so the last bits, of other products."""


def overflowing(prompt: MadePrompt) -> MadePrompt:
    """The same prompt at the end of fp32's range: finite in itself, which is all that an upload is checked for."""
    values = np.copysign(np.float32(3e38), prompt.soft_prompt.values)
    return replace(
        prompt,
        name="broken",
        ref=replace(prompt.ref, task="broken", digest="b" * 64, prefix_key="broken"),
        soft_prompt=SoftPrompt(kind=prompt.soft_prompt.kind, values=values),
    )


def can_be_resident(name: str, prompt: MadePrompt) -> bool:
    return name != "broken" or prompt.ref.kind == "prefix"


def run(world: World, cases: list[Case], **config: Any) -> dict[str, RowResult]:
    with world.driver(**config) as driver:
        # All but a prompt that compiles to nothing: it would be awaited for ever.
        driver.make_resident(name for name, prompt in world.prompts.items() if can_be_resident(name, prompt))
        return driver.run(cases)


def with_broken(world: World, source: str) -> World:
    prompts = world.prompts | {"broken": overflowing(world.prompts[source])}
    return World(world.family, world.folder, world.backbone, prompts, world.oracle)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["prefix", "long-prefix"])
def test_row_with_overflowing_keys_ends_and_its_neighbours_keep_every_bit(
    source: str, family: str, world_of: Callable[[str], World]
) -> None:
    sound_world = world_of(family)
    world = with_broken(sound_world, source)
    neighbours = sound_world.cases(seed=12)
    # In chunks, so that the broken row is in many steps with the others before it has to be given a token.
    row = world.case(random.Random(0), "row", "broken", 40, max_tokens=1, prompt_logprobs=False)
    config = {"max_rows": 32, "max_step_tokens": 256, "prefill_chunk": 8}
    at = len(neighbours) // 2
    broken = run(world, [*neighbours[:at], row, *neighbours[at:]], **config)
    sound = run(world, [*neighbours[:at], replace(row, prompt=source), *neighbours[at:]], **config)
    assert isinstance(broken.pop("row").error, NumericalError)
    assert sound.pop("row").error is None
    assert broken == sound


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_prompt_that_compiles_to_no_finite_prefix_is_refused_and_its_neighbours_keep_every_bit(
    family: str, world_of: Callable[[str], World]
) -> None:
    sound_world = world_of(family)
    world = with_broken(sound_world, "prompt-tuning")
    neighbours = sound_world.cases(seed=13)
    row = world.case(random.Random(0), "row", "broken", 9)
    with_it = run(world, [*neighbours[:5], row, *neighbours[5:]])
    without = run(world, neighbours)
    error = with_it.pop("row").error
    assert isinstance(error, NumericalError)
    assert "prefix" in error.message
    assert with_it == without


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_broken_row_beside_experts_leaves_its_neighbours_right(family: str, world_of: Callable[[str], World]) -> None:
    sound_world = world_of(family)
    world = with_broken(sound_world, "prefix")
    neighbours = sound_world.cases(seed=14)
    row = world.case(random.Random(0), "row", "broken", 40, prompt_logprobs=False)
    results = run(world, [*neighbours[:9], row, *neighbours[9:]], max_rows=32, prefill_chunk=8)
    assert isinstance(results["row"].error, NumericalError)
    assert world.differences(neighbours, results) == []


def test_pages_of_a_broken_row_serves_the_next_row_as_if_new(world_of: Callable[[str], World]) -> None:
    world = with_broken(world_of("llama"), "prefix")
    rng = random.Random(5)
    row = world.case(rng, "row", "broken", 30)
    following = [world.case(rng, f"next-{i}", name, 11) for i, name in enumerate(("prefix", None, "cpt"))]
    kv_bytes = world.backbone.max_model_len * world.backbone.bytes_per_token
    with world.driver(kv_cache_bytes=kv_bytes, max_rows=1, poison_freed_pages=False) as driver:
        assert isinstance(driver.run_alone(row).error, NumericalError)
        assert driver.count("rows_failed_total", reason=NumericalError.default_code) == 1
        results = driver.run(following)
    assert world.differences(following, results) == []
