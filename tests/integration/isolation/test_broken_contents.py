"""The gather broken on purpose, in ways that no index shows: right indices over wrong numbers.

The run-time check cannot see these. The audit does, which replays finished rows alone past everything that the engine
holds; and so does the tests' own comparison with PEFT.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from prompt_store.manifest import SoftPrompt
from server.engine import results
from server.engine.kernels.batch import LayerAttention, PagedBatch
from server.engine.prefix_maker import MadePrefix, PrefixMaker
from server.engine.request import PromptRef
from server.engine.sampler import DeviceSample, SamplerRow, sample_async
from server.errors import PromptmuxError
from tests.integration.isolation.comparison import differences_from_oracle
from tests.integration.isolation.driver import Case, EngineDriver
from tests.integration.isolation.world import TWINS, World

pytestmark = pytest.mark.usefixtures("each_way")

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "opt", "mixtral")


def make_cases(world: World) -> list[Case]:
    rng = random.Random(31)
    return [world.case(rng, f"row-{name}", name, rng.randint(3, 25), max_tokens=6) for name in [*world.prompts, None]]


def run_audited(world: World, cases: list[Case]) -> EngineDriver:
    with world.driver(audit_share=1.0) as driver:
        driver.make_resident()
        driver.run(cases)
        finish_audits(driver)
    return driver


def finish_audits(driver: EngineDriver) -> None:
    driver.run_until(lambda: driver.engine._auditor.num_pending == 0)


def rows_that_differ(world: World, cases: list[Case], driver: EngineDriver) -> set[str]:
    return {case.row_id for case in cases if differences_from_oracle(case, driver.results[case.row_id], world.oracle)}


def assert_caught(world: World, cases: list[Case], driver: EngineDriver, victims: set[str]) -> None:
    """The victims, and they alone, by audit and comparison; the run-time check had nothing to say."""
    assert driver.count("isolation_violations_total") == 0
    assert rows_that_differ(world, cases, driver) == victims
    assert driver.count("isolation_audits_total", result="mismatch") == len(victims)
    assert driver.count("isolation_audits_total", result="match") == len(cases) - len(victims)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "bloom", "gptj", "falcon"])
def test_audits_of_a_healthy_engine_all_match(family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    cases = make_cases(world)
    assert_caught(world, cases, run_audited(world, cases), victims=set())


@pytest.mark.parametrize("family", [*FAMILIES, "gptj"])
@pytest.mark.parametrize(("victim", "twin"), TWINS)
def test_another_prompts_keys_in_a_prefix_with_the_right_stamps_are_caught(
    victim: str, twin: str, family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    cases = make_cases(world)
    refs = [world.prompts[name].ref for name in (victim, twin)]
    with world.driver(audit_share=1.0) as driver:
        driver.make_resident()
        right, wrong = (driver.engine._prefixes.device._prefixes[ref.prefix_key] for ref in refs)
        for pages in (*driver.engine._pool.key_pages, *driver.engine._pool.value_pages):
            pages[torch.from_numpy(right.pages).long()] = pages[torch.from_numpy(wrong.pages).long()]
        right.tail = wrong.tail
        driver.run(cases)
        finish_audits(driver)
    assert_caught(world, cases, driver, {f"row-{victim}"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("victim", "twin"), TWINS)
def test_prefix_made_of_another_prompts_numbers_is_caught(
    victim: str, twin: str, family: str, world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(family)
    cases = make_cases(world)
    make_right = PrefixMaker.make_all

    def make_wrong(
        self: PrefixMaker, prompts: Sequence[tuple[PromptRef, SoftPrompt]]
    ) -> list[MadePrefix | PromptmuxError]:
        wrong = world.prompts[twin].soft_prompt
        return make_right(self, [(r, wrong if r == world.prompts[victim].ref else prompt) for r, prompt in prompts])

    monkeypatch.setattr(PrefixMaker, "make_all", make_wrong)
    assert_caught(world, cases, run_audited(world, cases), {f"row-{victim}"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["key_pages", "value_pages"])
def test_overwritten_pages_are_caught(which: str, family: str, world_of: Callable[[str], World]) -> None:
    world = world_of(family)
    cases = make_cases(world)
    with world.driver(audit_share=1.0) as driver:
        driver.make_resident()
        driver.submit(cases)
        driver.run_until(lambda: len(driver.results["row-cartridge"].token_ids) == 2)
        pages = driver.row("row-cartridge").pages
        assert pages is not None
        own = torch.from_numpy(pages.held).long()
        for tensor in getattr(driver.engine._pool, which):
            tensor[own] = torch.randn_like(tensor[own])
        driver.finish()
        finish_audits(driver)
    assert_caught(world, cases, driver, {"row-cartridge"})


def test_attention_that_reads_the_neighbours_pages_is_caught(
    world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    context = world.backbone._context
    attend = context.kernel

    def attend_next(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        batch: PagedBatch,
        layer: LayerAttention,
    ) -> torch.Tensor:
        if batch.num_decoding == len(batch.lengths):
            neighbours = dataclasses.replace(
                batch, page_table=batch.page_table.roll(1, 0), lengths=batch.lengths.roll(1)
            )
            return attend(query, key, value, key_pages, value_pages, neighbours, layer)
        return attend(query, key, value, key_pages, value_pages, batch, layer)

    monkeypatch.setattr(context, "kernel", attend_next)
    assert_caught(world, cases, run_audited(world, cases), {case.row_id for case in cases})


def test_logits_sampled_for_the_wrong_rows_are_caught(
    world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("llama")
    cases = make_cases(world)

    def sample_next(logits: torch.Tensor, rows: Sequence[SamplerRow], *, may_wait: bool) -> DeviceSample:
        return sample_async(logits.roll(1, 0), rows, may_wait=may_wait)

    monkeypatch.setattr(results, "sample_async", sample_next)
    assert_caught(world, cases, run_audited(world, cases), {case.row_id for case in cases})


def test_rows_served_with_each_others_prompts_are_caught(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    exchanged = {one: other for pair in TWINS for one, other in (pair, pair[::-1])}
    prompts = world.prompts | {name: world.prompts[other] for name, other in exchanged.items()}
    wrong = World(world.family, world.folder, world.backbone, prompts, world.oracle)
    driver = run_audited(wrong, cases)
    # The audit believes the request, which named the wrong prompt: only the comparison can know.
    assert driver.count("isolation_audits_total", result="mismatch") == 0
    assert rows_that_differ(world, cases, driver) == {f"row-{name}" for name in exchanged}
