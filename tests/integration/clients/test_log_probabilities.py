"""Log-probabilities over HTTP as evaluation harnesses read them, compared with PEFT's and transformers' own.

`harness_score` indexes an answer exactly as lm-evaluation-harness' `local-completions` does.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.integration.clients.tiny_server import EOS_ID, LABELS, TASKS, TinyServer

VOCAB_SIZE = 263
PROMPTS: list[str | None] = [*TASKS, None]


def random_ids(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, VOCAB_SIZE) for _ in range(length)]


def harness_score(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """The score of what follows the context, and whether greedy decoding would have said it."""
    scores = choice["logprobs"]["token_logprobs"][num_context:-1]
    top = choice["logprobs"]["top_logprobs"][num_context:-1]
    is_greedy = all(score == max(alternatives.values()) for score, alternatives in zip(scores, top, strict=True))
    return sum(scores), is_greedy


def oracle_scores(tiny: TinyServer, prompt: str | None, ids: Sequence[int]) -> torch.Tensor:
    """The log-probability of each token but the first, given those before it."""
    logprobs = tiny.oracle.logprobs(prompt, ids)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def body_of(tiny: TinyServer, prompt: str | None, ids: Any, **fields: Any) -> dict[str, Any]:
    return {"model": prompt or tiny.backbone, "prompt": ids, "temperature": 0, "echo": True, **fields}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_harness_gets_the_score_of_every_continuation(tiny: TinyServer, prompt: str | None) -> None:
    items = [random_ids(seed, length) for seed, length in enumerate((2, 5, 17, 40, 90))]
    # One continuation is what the model itself would have said.
    greedy = [*items[2], *tiny.oracle.greedy(prompt, items[2], 3)]
    items.append(greedy)
    contexts = [1, 3, 8, 39, 60, len(items[2])]

    answer = tiny.post("/v1/completions", body_of(tiny, prompt, items, max_tokens=1, logprobs=1, seed=1234))

    for choice, ids, num_context in zip(answer["choices"], items, contexts, strict=True):
        score, is_greedy = harness_score(choice, num_context)
        expected = oracle_scores(tiny, prompt, ids)[num_context - 1 :]
        best = tiny.oracle.logprobs(prompt, ids)[num_context - 1 : -1].argmax(dim=-1)
        assert score == pytest.approx(float(expected.sum()), abs=1e-3)
        assert is_greedy == (best.tolist() == ids[num_context:])
    assert harness_score(answer["choices"][-1], contexts[-1])[1]


def test_every_token_has_its_entry_and_nothing_virtual_has(tiny: TinyServer) -> None:
    ids = random_ids(1, 30)

    answer = tiny.post("/v1/completions", body_of(tiny, "front", ids, max_tokens=4, logprobs=5, ignore_eos=True))

    logprobs = answer["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {34}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert answer["usage"]["prompt_tokens"] == 30
    assert answer["usage"]["virtual_tokens"] == 5
    assert logprobs["token_logprobs"][1:30] == pytest.approx(oracle_scores(tiny, "front", ids).tolist(), abs=1e-3)


def test_an_end_of_sequence_has_its_entry_too(tiny: TinyServer) -> None:
    ids = random_ids(2, 6)

    answer = tiny.post(
        "/v1/completions", body_of(tiny, "layers", ids, max_tokens=5, logprobs=3, logit_bias={str(EOS_ID): 100})
    )

    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["logprobs"]["tokens"][6:] == ["<eos>"]
    # The backbone's own number, not the biased one.
    expected = float(tiny.oracle.logprobs("layers", ids)[-1, EOS_ID])
    assert choice["logprobs"]["token_logprobs"][6] == pytest.approx(expected, abs=1e-3)
    assert choice["logprobs"]["top_logprobs"][6]["<eos>"] == choice["logprobs"]["token_logprobs"][6]
    assert answer["usage"]["completion_tokens"] == 1


def test_no_new_tokens_leave_the_prompts_entries_alone(tiny: TinyServer) -> None:
    ids = random_ids(3, 25)

    none = tiny.post("/v1/completions", body_of(tiny, "front", ids, max_tokens=0, logprobs=2))
    one = tiny.post("/v1/completions", body_of(tiny, "front", ids, max_tokens=1, logprobs=2))

    logprobs = none["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 25
    assert none["usage"]["completion_tokens"] == 0
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        one["choices"][0]["logprobs"]["token_logprobs"][1:-1], abs=1e-4
    )


def test_alternatives_are_the_likeliest_and_the_larger_of_two_that_read_alike_stays(tiny: TinyServer) -> None:
    ids = random_ids(4, 20)

    answer = tiny.post("/v1/completions", body_of(tiny, "front", ids, max_tokens=0, logprobs=20))

    logprobs = answer["choices"][0]["logprobs"]
    expected = tiny.oracle.logprobs("front", ids)
    num_collisions = 0
    for index in range(1, 20):
        best: dict[str, float] = {}
        values, top_ids = expected[index - 1].topk(20)
        for value, token_id in zip(values.tolist(), top_ids.tolist(), strict=True):
            best.setdefault(tiny.tokenizer.decode([token_id]), value)
        own, top = logprobs["token_logprobs"][index], logprobs["top_logprobs"][index]
        text = logprobs["tokens"][index]
        assert {name: value for name, value in top.items() if name in best} == pytest.approx(best, abs=1e-3)
        # The same float, but where another token of the same text is likelier.
        assert top[text] >= own
        assert top[text] == own or text == "\N{REPLACEMENT CHARACTER}"
        num_collisions += len(best) < 20
    assert num_collisions, "no two alternatives read alike: the case was not met"


def test_numbers_are_always_finite(tiny: TinyServer) -> None:
    ids = random_ids(5, 10)
    body = body_of(tiny, None, ids, max_tokens=20, logprobs=20, logit_bias={"5": -100, "6": 100}, ignore_eos=True)

    answer = tiny.post("/v1/completions", body)

    logprobs = answer["choices"][0]["logprobs"]
    numbers = [*logprobs["token_logprobs"][1:], *(v for top in logprobs["top_logprobs"][1:] for v in top.values())]
    assert all(-9999 <= number <= 0 for number in numbers)


def test_a_streamed_fan_out_with_echo_is_the_whole_one(tiny: TinyServer) -> None:
    body = {
        "tasks": [*TASKS, tiny.backbone], "prompt": "é then", "echo": True, "logprobs": 2, "max_tokens": 6, "seed": 3,
        "temperature": 1, "ignore_eos": True,
    }  # fmt: skip
    whole = tiny.post("/v1/completions", body)

    chunks = tiny.stream("/v1/completions", body)

    for choice, task in zip(whole["choices"], body["tasks"], strict=True):  # type: ignore[call-overload]
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert choice["text"].startswith("é then")
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert {c["task"] for c in mine} == {choice["task"]} == {task}
        assert all(c["prompt"] == choice["prompt"] for c in mine)
        for name, values in choice["logprobs"].items():
            streamed = [value for c in mine if c["logprobs"] for value in c["logprobs"][name]]
            if name == "token_logprobs":
                assert streamed[1:] == pytest.approx(values[1:], abs=1e-4)
            elif name != "top_logprobs":
                assert streamed == values


@pytest.mark.parametrize("prompt", PROMPTS)
def test_classes_have_the_probabilities_of_their_tokens(tiny: TinyServer, prompt: str | None) -> None:
    inputs = ["the day", "not at all é "]

    answer = tiny.post("/v1/classify", {"model": prompt or tiny.backbone, "input": inputs, "labels": LABELS})

    for text, item in zip(inputs, answer["data"], strict=True):
        scores = []
        for label in LABELS:
            stem = tiny.tokenizer(text.rstrip(" "))["input_ids"]
            ids = tiny.tokenizer(f"{text.rstrip(' ')} {label}")["input_ids"]
            assert ids[: len(stem)] == stem
            scores.append(float(oracle_scores(tiny, prompt, ids)[len(stem) - 1 :].sum()))
        expected = torch.tensor(scores).softmax(dim=0).tolist()
        assert item["probs"] == pytest.approx(expected, abs=1e-3)
        assert item["label"] == LABELS[expected.index(max(expected))]
    if prompt is not None:
        default = tiny.post("/v1/classify", {"model": prompt, "input": inputs})
        assert [item["probs"] for item in default["data"]] == [
            pytest.approx(item["probs"], abs=1e-4) for item in answer["data"]
        ]
