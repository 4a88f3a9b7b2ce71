"""The OpenAPI page is true: what it documents is what the server answers."""

from typing import Any

import pytest
from pydantic import BaseModel

from server.api.chat_schemas import ChatCompletionRequest
from server.api.classify_schemas import ClassifyRequest
from server.api.completion_schemas import CompletionRequest
from server.api.tokenize import DetokenizeRequest, TokenizeRequest
from tests.unit.api.live_server import LiveServer


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> dict[str, Any]:
    with server.client() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def test_frameworks_own_validation_error_is_nowhere(schema: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in str(schema)
    assert "422" not in schema["paths"]["/v1/completions"]["post"]["responses"]
    assert "422" in schema["paths"]["/v1/tasks/{task}/versions"]["post"]["responses"]


def test_every_error_is_documented_with_the_error_body(schema: dict[str, Any]) -> None:
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status >= "400":
                    reference = response["content"]["application/json"]["schema"]["$ref"]
                    assert reference.endswith("/ErrorResponse"), path


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "capital", "prompt": "x"}, 200),
        ({"model": "capital", "prompt": ""}, 400),
        ({"model": "nobody", "prompt": "x"}, 404),
    ],
)
def test_answers_have_documented_statuses(
    server: LiveServer, schema: dict[str, Any], body: dict[str, Any], status: int
) -> None:
    assert server.post(body).status_code == status
    assert str(status) in schema["paths"]["/v1/completions"]["post"]["responses"]


def test_examples_of_the_request_are_sound_and_answered(server: LiveServer) -> None:
    examples = CompletionRequest.model_config["json_schema_extra"]["examples"]  # type: ignore[index]

    for example in examples:
        renamed = {"model": "capital"} if "model" in example else {"tasks": ["capital", "german"]}
        assert server.post(example | renamed).status_code == 200


@pytest.mark.parametrize(
    ("path", "request_type"),
    [
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/classify", ClassifyRequest),
        ("/tokenize", TokenizeRequest),
        ("/detokenize", DetokenizeRequest),
    ],
)
def test_examples_of_other_requests_are_answered(server: LiveServer, path: str, request_type: type[BaseModel]) -> None:
    examples = request_type.model_config["json_schema_extra"]["examples"]  # type: ignore[index]

    with server.client() as client:
        for example in examples:
            renamed = {"model": "capital"} if "model" in example else {}
            assert client.post(path, json=example | renamed).status_code == 200


def test_every_field_of_the_contract_is_documented(schema: dict[str, Any]) -> None:
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]

    assert set(fields) == {
        "model", "prompt", "tasks", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop",
        "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "echo", "stream", "stream_options", "top_k",
        "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "add_special_tokens",
        "skip_special_tokens", "best_of", "suffix", "response_format", "user", "priority", "include_stop_str_in_output",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_are_documented(schema: dict[str, Any], path: str) -> None:
    answer = schema["paths"][path]["post"]["responses"]["200"]

    assert set(answer["content"]) == {"application/json", "text/event-stream"}
    assert "x-prompt-digest" in answer["headers"]


def test_documentation_page_is_served(server: LiveServer) -> None:
    with server.client() as client:
        assert client.get("/docs").status_code == 200
