"""The same comparison on the embedded backbone in fp32, with the trained demo prompts among those of every kind."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.embedded import default_cache_dir, ensure_embedded_backbone
from tests.integration.isolation.driver import Case
from tests.integration.isolation.world import World, make_world

DEMO = Path(__file__).parents[3] / "demo"
MAX_TOKENS = 6

TEXTS = (
    "France ->",
    "The quick brown fox jumps over the lazy dog, and then",
    "Q: What is the capital of Norway?\nA:",
    "twenty-three",
    "wonderful ->",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived an old woman who knew the names of all the birds.",
    "ran",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = ensure_embedded_backbone(default_cache_dir(), progress=False)
    trained = sorted(card.parent for card in DEMO.glob("*/card.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first_text = tokenizer(" ".join(TEXTS * 3))["input_ids"]
    # Wide random prefixes make a deep backbone chaotic: PEFT's own fp32 is then 1e-2 nats off its fp64.
    return make_world(
        "llama", folder, tmp_path_factory.mktemp("real"), scale=0.1, first_text=first_text, trained=trained
    )


@pytest.fixture(scope="module")
def cases(world: World) -> list[Case]:
    """Demo prompts with an example of their own, the others with any text, and two rows without a prompt."""
    tokenizer = world.backbone.tokenizer
    texts: list[tuple[str | None, str]] = [(name, example_of(name)) for name in world.prompts if is_demo(world, name)]
    others = [*(name for name in world.prompts if not is_demo(world, name)), None, None]
    texts += zip(others, itertools.cycle(TEXTS), strict=False)
    return [
        Case(row_id=f"row-{i}", prompt=name, token_ids=tuple(tokenizer(text)["input_ids"]), max_tokens=MAX_TOKENS)
        for i, (name, text) in enumerate(texts)
    ]


def is_demo(world: World, name: str) -> bool:
    return world.prompts[name].folder.parent == DEMO


def example_of(task: str) -> str:
    prompt: str = json.loads((DEMO / task / "card.json").read_text())["examples"][0]["prompt"]
    return prompt


def test_demo_prompts_of_both_methods_are_among_those_compared(world: World) -> None:
    kinds = {prompt.kind for name, prompt in world.prompts.items() if is_demo(world, name)}
    assert kinds >= {"PROMPT_TUNING", "PREFIX_TUNING"}


def test_row_in_a_mixed_batch_equals_peft_and_its_batch_of_one(world: World, cases: list[Case]) -> None:
    with world.driver(prefill_chunk=16, audit_share=1.0) as driver:
        driver.make_resident()
        results = driver.run(cases)
        driver.run_until(lambda: driver.engine._auditor.num_pending == 0)
        assert driver.count("batch_rows_sum") > driver.count("batch_rows_count") * len(cases) / 3
        assert driver.count("isolation_violations_total") == 0
        assert driver.count("isolation_audits_total", result="match") == len(cases)
    assert world.differences(cases, results) == []


def test_comparison_fails_when_two_rows_exchange_their_prompts(world: World, cases: list[Case]) -> None:
    exchanged = {"prompt-tuning": "twin", "twin": "prompt-tuning", "prefix": "prefix-twin", "prefix-twin": "prefix"}
    chosen = [case for case in cases if case.prompt in exchanged]
    prompts = world.prompts | {name: world.prompts[other] for name, other in exchanged.items()}
    wrong = World(world.family, world.folder, world.backbone, prompts, world.oracle)
    with wrong.driver() as driver:
        results = driver.run(chosen)
    for case in chosen:
        assert world.differences([case], results) != [], f"{case.prompt} goes unnoticed"
