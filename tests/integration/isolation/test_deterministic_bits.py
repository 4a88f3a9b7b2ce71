"""The deterministic mode on the embedded backbone, in both dtypes that CPUs serve: one row, the same bits.

A fixed row, with a trained prompt, is run alone and then among others that come and go around it. The inverse test
runs the same without the mode: were the bits equal there too, equality would prove nothing. It does so in fp32, where
products are a library's that divides them by their shape; our own bf16 kernel may give the same bits even so.
"""

import random
from pathlib import Path

import pytest

from server.embedded import default_cache_dir, ensure_embedded_backbone
from server.engine.backbone import Backbone
from tests.factories import TEST_DEVICE, MadePrompt, read_prompt
from tests.integration.isolation.driver import Case, EngineDriver, RowResult

DEMO = Path(__file__).parents[3] / "demo"
TASKS = ("country-capital", "past-tense", "word-sentiment", "number-words")
MAX_ROWS = 8
NUM_ROUNDS = 2
CONFIG = {"max_rows": MAX_ROWS, "max_step_tokens": 64, "prefill_chunk": 16}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load(request.param)


def load(dtype: str) -> Backbone:
    folder = ensure_embedded_backbone(default_cache_dir(), progress=False)
    return Backbone.load(str(folder), dtype=dtype, device=TEST_DEVICE)


def read_prompts(backbone: Backbone) -> dict[str, MadePrompt]:
    shape = backbone.shape(max_virtual_tokens=64)
    return {task: read_prompt(task, DEMO / task, shape) for task in TASKS}


def needle(backbone: Backbone) -> Case:
    """Long enough that its text is read in chunks."""
    text = "One of these is the capital of a country in the north of Europe, and another one is not. France ->"
    return Case(row_id="needle", prompt="country-capital", token_ids=encode(backbone, text), max_tokens=12)


def company(backbone: Backbone, number: int) -> list[Case]:
    """Rows of other lengths, tasks and ends; where the needle stands among them is drawn too."""
    rng = random.Random(number)
    texts = (
        "go ->",
        "wonderful ->",
        "42",
        "Once upon a time there was a king who had three daughters ->",
        "a",
        "Peru ->",
    )
    rows = [
        Case(
            row_id=f"other-{i}",
            prompt=rng.choice([*TASKS, None]),
            token_ids=encode(backbone, rng.choice(texts)) * rng.randint(1, 4),
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
        )
        for i in range(MAX_ROWS + 3)
    ]
    rows.insert(rng.randrange(len(rows)), needle(backbone))
    return rows


def encode(backbone: Backbone, text: str) -> tuple[int, ...]:
    return tuple(backbone.tokenizer(text)["input_ids"])


def run(backbone: Backbone, cases: list[Case], *, is_deterministic: bool) -> RowResult:
    """What the needle was given; the driver's engine decides the backbone's mode."""
    with EngineDriver(backbone, read_prompts(backbone), is_deterministic=is_deterministic, **CONFIG) as driver:
        driver.make_resident()
        return driver.run(cases)["needle"]


def bits(result: RowResult) -> tuple[list[int], list[object], list[object]]:
    """Every number that was delivered: floats are compared as they are."""
    assert result.error is None
    return result.token_ids, list(result.logprobs), list(result.prompt_logprobs)


def test_a_rows_bits_are_the_same_alone_and_in_any_company(backbone: Backbone) -> None:
    alone = bits(run(backbone, [needle(backbone)], is_deterministic=True))
    assert len(alone[0]) > 1

    for number in range(NUM_ROUNDS):
        found = run(backbone, company(backbone, number), is_deterministic=True)
        assert bits(found) == alone, f"round {number}"


def test_without_the_mode_the_bits_depend_on_the_company() -> None:
    backbone = load("float32")
    alone = bits(run(backbone, [needle(backbone)], is_deterministic=False))
    others = [bits(run(backbone, company(backbone, number), is_deterministic=False)) for number in range(NUM_ROUNDS)]

    assert any(found != alone for found in others)
