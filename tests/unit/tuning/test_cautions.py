"""Warnings come where prompts are known to fail, and nowhere else."""

from typing import Any

import pytest

from prompt_store.cautions import few_virtual_tokens, small_backbone
from tuning.cautions import find_cautions
from tuning.config import TrainConfig
from tuning.examples import EncodedExample, Example


def find(completion: str = " Paris", *, num_tokens: int = 3, count: int = 40, **config: Any) -> list[str]:
    fields: dict[str, Any] = {"method": "p_tuning_v2", "num_steps": 10} | config
    train = [Example(f"p{n}", completion) for n in range(count)]
    encoded = [EncodedExample((5,), (6,) * num_tokens)] * count
    return list(find_cautions(TrainConfig(**fields), num_parameters=135_000_000, train=train, encoded=encoded))


def codes(warnings: list[str]) -> list[str]:
    return [warning.partition(":")[0] for warning in warnings]


def test_short_answers_to_a_deep_prompt_give_no_warning() -> None:
    assert find() == []


def test_shallow_prompts_are_warned_of_in_the_stores_own_words() -> None:
    small, few = find(method="prompt_tuning", num_virtual_tokens=5)
    assert small.startswith(small_backbone(135_000_000)[0])
    assert few.startswith(few_virtual_tokens(5)[0])
    assert "Try --method p_tuning_v2" in small
    large = TrainConfig(method="prompt_tuning", num_steps=1)
    assert find_cautions(large, num_parameters=7 * 10**9, train=[Example("a", "b")] * 40, encoded=[]) == ()


@pytest.mark.parametrize(
    "completion",
    ['{"city": "Paris"}', "[1, 2]", "def f(x):\n    return x", "```python\nx\n```", "<b>bold</b>"],
)
def test_structured_output_is_warned_of(completion: str) -> None:
    assert codes(find(completion)) == ["structured_output"]


@pytest.mark.parametrize("completion", [" Let me see [sic]", " import duties", " class action", " a < b and c > d"])
def test_plain_text_is_not_taken_for_structure(completion: str) -> None:
    assert find(completion) == []


@pytest.mark.parametrize(
    ("completion", "num_tokens"),
    [(" Let's think step by step.", 9), (" x", 200), (" 2 + 2\n#### 4", 9), (" a.\nTherefore b.", 9)],
)
def test_long_and_reasoned_answers_are_warned_of(completion: str, num_tokens: int) -> None:
    assert codes(find(completion, num_tokens=num_tokens)) == ["long_reasoning"]


def test_few_examples_are_warned_of() -> None:
    assert codes(find(count=8)) == ["few_examples"]
