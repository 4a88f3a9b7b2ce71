"""What `POST /v1/classify` answers, compared with sums over what the echo engine says of each token."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.classify_schemas import ClassifyResponse
from server.errors import NumericalError
from server.runtime.service import Runtime
from tests.fakes import BOS_ID, expected_logprob
from tests.unit.api.live_server import LiveServer, running_server

LABELS = ["good", "bad", "so-so"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running_server(tmp_path_factory.mktemp("data"), max_waiting_rows=40, max_request_tokens=2000) as live:
        assert live.upload("labelled", 0.1, metadata=json.dumps({"labels": LABELS})).status_code == 201
        assert live.upload("plain", 0.2).status_code == 201
        for number, labels in enumerate(({}, [], ["one"], ["a", "a"], ["a", ""], ["a", 1], ["a"] * 129)):
            assert live.upload(f"odd{number}", 0.3, metadata=json.dumps({"labels": labels})).status_code == 201
        yield live


def classify(server: LiveServer, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/classify", json=body)


def expected_probs(labels: list[str], separator: str = " ") -> list[float]:
    scores = [sum(expected_logprob(byte) for byte in f"{separator}{label}".encode()) for label in labels]
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def test_probabilities_are_those_of_the_labels_tokens(server: LiveServer) -> None:
    response = classify(server, {"model": "plain", "input": ["fine day", "é"], "labels": LABELS})

    body = response.json()
    assert response.status_code == 200, response.text
    assert ClassifyResponse.model_validate(body, strict=True)
    assert body["object"] == "list"
    assert body["id"].startswith("classify-")
    assert body["labels"] == LABELS
    assert body["prompt"]["task"] == "plain"
    assert response.headers["x-prompt-digest"] == body["prompt"]["digest"]
    for index, item in enumerate(body["data"]):
        assert item["index"] == index
        assert item["num_classes"] == 3
        assert item["probs"] == pytest.approx(expected_probs(LABELS), abs=1e-12)
        assert item["label"] == LABELS[max(range(3), key=item["probs"].__getitem__)]
        assert sum(item["probs"]) == pytest.approx(1)
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["prompt_tokens"] == sum(
        1 + len(f"{text} {label}".encode()) for text in ("fine day", "é") for label in LABELS
    )


def test_each_pair_is_one_row_of_one_batch(server: LiveServer) -> None:
    before = len(server.engine.submitted)

    classify(server, {"model": "plain", "input": ["a", "b"], "labels": ["x", "yy"], "priority": 3})

    rows = server.engine.submitted[before:]
    assert [bytes(row.token_ids[1:]).decode() for row in rows] == ["a x", "a yy", "b x", "b yy"]
    assert all(row.token_ids[0] == BOS_ID for row in rows)
    assert all((row.sampling.max_tokens, row.sampling.prompt_logprobs) == (0, 0) for row in rows)
    assert {row.priority for row in rows} == {3}


def test_labels_default_to_those_of_the_prompts_version(server: LiveServer) -> None:
    body = classify(server, {"model": "labelled", "input": "fine"}).json()

    assert body["labels"] == LABELS
    assert body["prompt"]["task"] == "labelled"
    assert body["model"] == "labelled"
    assert body["data"][0]["probs"] == pytest.approx(expected_probs(LABELS))
    # A version keeps its labels.
    assert server.upload("labelled", 0.9, metadata=json.dumps({"labels": ["p", "q"]})).status_code == 201
    assert classify(server, {"model": "labelled", "input": "fine"}).json()["labels"] == ["p", "q"]
    assert classify(server, {"model": "labelled@1", "input": "fine"}).json()["labels"] == LABELS


def test_labels_are_those_of_the_version_that_answers_even_if_another_is_rolled_out_meanwhile(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = Runtime.resolve

    with running_server(data_dir) as live:
        assert live.upload("task", 0.1, metadata=json.dumps({"labels": ["a", "b"]})).status_code == 201

        async def resolve_and_roll_out(self: Runtime, *args: Any, **kwargs: Any) -> Any:
            found = await resolve(self, *args, **kwargs)
            upload = asyncio.to_thread(live.upload, "task", 0.2, metadata=json.dumps({"labels": ["c", "d"]}))
            assert (await upload).status_code == 201
            return found

        monkeypatch.setattr(Runtime, "resolve", resolve_and_roll_out)
        body = classify(live, {"model": "task", "input": "x"}).json()

    assert (body["labels"], body["prompt"]["version"]) == (["a", "b"], 1)


@pytest.mark.parametrize("model", ["plain", "tiny/echo", *(f"odd{number}" for number in range(7))])
def test_without_labels_anywhere_it_is_400(server: LiveServer, model: str) -> None:
    response = classify(server, {"model": model, "input": "x"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "labels"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": "a", "labels": ["b", "c"]}, "a b"),
        ({"input": "a ", "labels": ["b", "c"]}, "a b"),
        ({"input": "a", "labels": [" b", "c"]}, "a b"),
        ({"input": "a", "labels": ["b", "c"], "separator": ""}, "ab"),
        ({"input": "a ", "labels": ["b", "c"], "separator": ": "}, "a : b"),
    ],
)
def test_a_separator_stands_between_input_and_label(server: LiveServer, fields: dict[str, Any], said: str) -> None:
    before = len(server.engine.submitted)

    assert classify(server, {"model": "plain", **fields}).status_code == 200

    assert bytes(server.engine.submitted[before].token_ids[1:]).decode() == said


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input.1"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [1, 2]}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["a"] * 257}, "input"),
    ({"input": ["a"] * 21}, "input"),
    ({"input": "x" * 1001}, "input"),
    ({"input": ["x" * 500, "x" * 501]}, "input.1"),
    ({"labels": []}, "labels"),
    ({"labels": ["a"]}, "labels"),
    ({"labels": ["a", "a"]}, "labels"),
    ({"labels": ["a", ""]}, "labels.1"),
    ({"labels": ["a", 1]}, "labels.1"),
    ({"labels": ["a", "b" * 257]}, "labels.1"),
    ({"labels": [str(i) for i in range(129)]}, "labels"),
    ({"separator": "-" * 17}, "separator"),
    ({"priority": 101}, "priority"),
    ({"activation": True}, "activation"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_field_is_named_and_nothing_runs(server: LiveServer, change: dict[str, Any], param: str) -> None:
    before = len(server.engine.submitted)

    response = classify(server, {"model": "plain", "input": "x", "labels": ["a", "b"]} | change)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(server.engine.submitted) == before


def test_unknown_task_is_404_with_and_without_labels(server: LiveServer) -> None:
    for fields in ({}, {"labels": ["a", "b"]}):
        response = classify(server, {"model": "nobody", "input": "x", **fields})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_input_that_is_too_long_is_named(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        response = classify(live, {"model": "tiny/echo", "input": "x" * 4095, "labels": ["a", "b"]})

    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "input"


def test_a_rows_error_is_the_requests(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.errors = {"bad": NumericalError("the logits are not finite")}
        response = classify(live, {"model": "tiny/echo", "input": "x", "labels": ["good", "bad"]})
        live.wait_until_idle()

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "non_finite_logits"
