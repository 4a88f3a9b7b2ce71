"""Every refusal of the completions route: its status, its code, and the field that it names."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from server.errors import IsolationError, NumericalError
from tests.fakes import EchoServerParts, make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

GOOD: dict[str, Any] = {"model": "capital", "prompt": "x"}

BAD_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 10**9}, "n"),
    ({"tasks": [1] * 70_000}, "tasks.0"),
    ({"tasks": ["capital"] * 70_000}, "tasks"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": "3"}, "n"),
    ({"n": True}, "n"),
    ({"n": 2.0}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-39}, "repetition_penalty"),
    ({"repetition_penalty": 10.1}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "!"}, "suffix"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": []}, "tools"),
    ({"prompts": "x"}, "prompts"),
    ({"echo": "yes"}, "echo"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": ["a", 1]}, "stop.1"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids.0"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"258": 1}}, "logit_bias.258"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"1": "1"}}, "logit_bias.1"),
    ({"logit_bias": {"1": None}}, "logit_bias.1"),
    ({"logit_bias": {"1": True}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": ["a", [1]]}, "prompt.1"),
    ({"prompt": [1, "a"]}, "prompt.1"),
    ({"prompt": [[1], [2, -1]]}, "prompt.1.1"),
    ({"prompt": [1, True]}, "prompt.1"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": [258]}, "prompt.0"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": "half \ud800"}, "prompt"),
    ({"prompt": ["half \udfff"]}, "prompt.0"),
    ({"stop": "\ud800"}, "stop"),
    ({"half \ud800": 1}, None),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"tasks": []}, "tasks"),
    ({"tasks": ["capital", "capital"], "prompt": ["a", "b", "c"]}, "tasks"),
    ({"tasks": ["capital"] * 257}, "tasks"),
    ({"tasks": [1]}, "tasks.0"),
    ({"tasks": ["german"], "model": "capital"}, "model"),
    ({"prompt": ["a"] * 200, "n": 8, "max_tokens": 1}, "n"),
    ({"prompt": ["a"] * 100, "n": 8, "max_tokens": 1000}, "max_tokens"),
]


def test_a_good_request_is_good(server: LiveServer) -> None:
    """The oracle of the table below: without the bad field the request is answered."""
    assert server.post(GOOD).status_code == 200


@pytest.mark.parametrize(("change", "param"), BAD_FIELDS, ids=lambda value: ascii(value)[:60])
def test_bad_field_is_named_and_nothing_runs(server: LiveServer, change: dict[str, Any], param: str | None) -> None:
    before = len(server.engine.submitted)
    started_s = time.perf_counter()

    with server.client() as client:
        response = client.post(
            "/v1/completions", content=json.dumps(GOOD | change), headers={"content-type": "application/json"}
        )

    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert len(error["message"]) < 400
    assert len(server.engine.submitted) == before
    assert time.perf_counter() - started_s < 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b'"text"', None),
        (b'{"model": "capital", "prompt": "x"} trailing', None),
        (b'{"model": "capital", "prompt": "\xff"}', None),
        (b"\xef\xbb\xbf{}", None),
        (b'{"model": "capital", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "capital", "prompt": "x", "temperature": Infinity}', "temperature"),
        (b'{"model": "capital", "prompt": "x", "temperature": -Infinity}', "temperature"),
        (b'{"model": "capital", "prompt": "x", "top_p": 1e999}', "top_p"),
        (b'{"model": "capital", "prompt": "x", "logit_bias": {"3": -1e999}}', "logit_bias.3"),
        (b'{"model": "capital", "prompt": [1, 1e999]}', "prompt.1"),
        (b'{"model": "capital", "model": "german", "prompt": "x"}', "model"),
        (b'{"model": "capital", "prompt": "x", "n": ' + b"1" * 5000 + b"}", None),
        (b"[" * 100_000, None),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": "capital"}', "prompt"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_bad_json_is_refused(server: LiveServer, body: bytes, param: str | None) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_body_must_say_that_it_is_json(server: LiveServer, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    with server.client() as client:
        response = client.post("/v1/completions", content=json.dumps(GOOD), headers=headers)

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_content_type"


@pytest.mark.parametrize(
    "reference",
    [
        "nobody",
        "capital@3",
        "capital@0",
        "capital@x",
        "capital@sha256:" + "0" * 64,
        "Capital",
        "../x",
        "",
        "é",
        "a" * 500,
    ],
)
def test_unknown_task_is_404(server: LiveServer, reference: str) -> None:
    response = server.post({"model": reference, "prompt": "x"})

    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_one_unknown_task_of_several_refuses_all(server: LiveServer) -> None:
    before = len(server.engine.submitted)

    for streams in (False, True):
        refused = server.post({"tasks": ["capital", "nobody", "capital"], "prompt": "x", "stream": streams})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "tasks.1")
    assert len(server.engine.submitted) == before


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": "x" * 4092}, "prompt"),
        ({"max_tokens": 4092}, "max_tokens"),
        ({"prompt": [1] * 4096}, "prompt"),
    ],
)
def test_too_long_a_prompt_is_refused_with_the_length(server: LiveServer, change: dict[str, Any], param: str) -> None:
    response = server.post(GOOD | change)

    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 4096 tokens.")
    assert error["param"] == param


def test_virtual_tokens_count_for_the_length(server: LiveServer) -> None:
    fits_bare = {"prompt": [1] * 4094, "max_tokens": 2}

    assert server.post({"model": "tiny/echo", **fits_bare}).status_code == 200
    assert server.post({"model": "capital", **fits_bare}).json()["error"]["code"] == "context_length_exceeded"


def test_full_queue_is_503_with_retry_after(data_dir: Path) -> None:
    with running_server(data_dir, max_waiting_rows=2) as live:
        response = live.post({"model": "tiny/echo", "prompt": ["a", "b", "c"]})
        assert response.status_code == 400  # could never be taken
        live.engine.max_waiting_rows = 1
        response = live.post({"model": "tiny/echo", "prompt": ["a", "b"]})

        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_full"
        assert 1 <= int(response.headers["retry-after"]) <= 30
        live.wait_for_metric(1, "requests_rejected_total", reason="queue_full")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (IsolationError("the row was ended"), 500, "isolation_violation"),
        (NumericalError("not finite"), 500, "non_finite_logits"),
    ],
)
def test_a_rows_error_is_the_requests_and_ends_its_other_rows(
    server: LiveServer, error: Exception, status: int, code: str
) -> None:
    server.engine.errors = {"poison": error}  # type: ignore[dict-item]
    try:
        response = server.post(
            {"model": "tiny/echo", "prompt": ["poison", "innocent"], "ignore_eos": True, "max_tokens": 4000}
        )
    finally:
        server.engine.errors = {}

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    innocent = server.engine.submitted[-1].row_id
    server.engine.wait_for(lambda engine: innocent in engine.cancelled)
    server.engine.wait_for(lambda engine: engine.num_rows == 0)


def test_corrupt_prompt_is_503_and_not_to_be_retried(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        digest = live.upload("capital").json()["digest"]
        blob = next(path for path in data_dir.rglob(f"{digest}*") if path.is_file())
        blob.chmod(0o600)
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)

        answers = [live.post({"model": "capital", "prompt": "x"} | extra) for extra in ({}, {"stream": True}, {})]
        untouched = live.post({"model": "tiny/echo", "prompt": "x"})

        for answer in answers:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "prompt_corrupt"
            assert answer.headers["x-should-retry"] == "false"
        assert untouched.status_code == 200
        assert live.metric("prompt_digest_mismatch_total") == 1


def test_engine_failure_is_503_and_livez_tells(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.crash("RuntimeError: boom")

        response = live.post({"model": "tiny/echo", "prompt": "x"})
        with live.client() as client:
            health = [client.get(path) for path in ("/livez", "/readyz", "/health")]

        assert response.json()["error"]["code"] == "engine_failed"
        for answer in (response, health[0]):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) == 30
        live.wait_until(lambda: live.runtime.state == "failed")
        with live.client() as client:
            assert client.get("/readyz").json()["error"]["code"] == "engine_failed"


def test_unexpected_exception_is_500_and_tells_nothing(data_dir: Path) -> None:
    class Broken(EchoServerParts):
        def make_engine(self, *arguments: Any) -> Any:
            engine = super().make_engine(*arguments)
            engine.submit = _raise_secret  # type: ignore[method-assign]
            return engine

    with running_server(data_dir, parts=Broken()) as live:
        response = live.post({"model": "tiny/echo", "prompt": "x"}, headers={"x-request-id": "mine"})

        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "An internal error occurred.", "type": "server_error", "param": None, "code": "internal_error",
        }  # fmt: skip
        assert response.headers["x-request-id"] == "mine"
        assert live.post({"model": "tiny/echo", "prompt": ""}).status_code == 400


def _raise_secret(rows: object) -> None:
    raise RuntimeError("the secret is 42")


def test_files_of_the_fixture_are_what_the_store_takes() -> None:
    assert make_prompt_file(0.1) != make_prompt_file(0.2)
    assert json.loads(make_prompt_config())["peft_type"] == "PROMPT_TUNING"
