"""Every line of the contract's table of errors, read whole: status, headers, and each field of the body."""

import errno
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompt_store.blobs import FileBlobs
from prompt_store.store import PromptStore
from server.errors import IsolationError, NumericalError
from tests.fakes import EchoServerParts, make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

BARE: dict[str, Any] = {"model": "tiny/echo", "prompt": "x"}


def check(
    answer: httpx.Response,
    status: int,
    *,
    message: str,
    error_type: str,
    code: str,
    param: str | None = None,
    retry_after: int | None = None,
    should_retry: str | None = None,
) -> None:
    """The whole body is one error object with these four fields and no other; the headers say whether to try again."""
    expected = {"error": {"message": message, "type": error_type, "param": param, "code": code}}
    assert (answer.status_code, answer.json()) == (status, expected)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == (None if retry_after is None else str(retry_after))
    assert answer.headers.get("x-should-retry") == should_retry
    assert answer.headers["x-request-id"]


@contextmanager
def keyed_server(data_dir: Path) -> Iterator[tuple[LiveServer, str]]:
    """A server with one key that may infer and nothing else."""
    with PromptStore.open(data_dir) as store:
        _, secret = store.create_key("acme", ["infer"])
    with running_server(data_dir) as live:
        yield live, secret


def upload(live: LiveServer, *, file: bytes, config: bytes | None = None, **fields: str) -> httpx.Response:
    files = {
        "file": ("adapter_model.safetensors", file),
        "config": ("adapter_config.json", config if config is not None else make_prompt_config()),
    }
    with live.client() as client:
        return client.post("/v1/tasks/fresh/versions", data=fields, files=files)


def test_400_names_the_field(server: LiveServer) -> None:
    check(
        server.post(BARE | {"n": 0}),
        400,
        message="n: must be greater than or equal to 1.",
        error_type="invalid_request_error",
        code="invalid_request",
        param="n",
    )


def test_400_when_the_context_is_exceeded(server: LiveServer) -> None:
    answer = server.post({"model": "capital", "prompt": "x" * 4090, "max_tokens": 5})

    check(
        answer,
        400,
        message="This model's maximum context length is 4096 tokens. However, you requested 4100 tokens (4091 in the "
        "prompt, 4 virtual, 5 in the completion). Please reduce the length of the prompt or completion.",
        error_type="invalid_request_error",
        code="context_length_exceeded",
        param="max_tokens",
    )


def test_401_without_and_with_a_wrong_key(data_dir: Path) -> None:
    with keyed_server(data_dir) as (live, _):
        check(
            live.post(BARE),
            401,
            message="No API key was given: send it as 'Authorization: Bearer <key>'.",
            error_type="authentication_error",
            code="invalid_api_key",
        )
        check(
            live.post(BARE, headers={"authorization": "Bearer wrong"}),
            401,
            message="The API key is not valid.",
            error_type="authentication_error",
            code="invalid_api_key",
        )


def test_403_names_the_scope(data_dir: Path) -> None:
    with keyed_server(data_dir) as (live, secret), live.client() as client:
        check(
            client.delete("/v1/tasks/x", headers={"authorization": f"Bearer {secret}"}),
            403,
            message="The API key lacks the scope 'write'.",
            error_type="permission_error",
            code="insufficient_scope",
        )


def test_404_of_an_unknown_task(server: LiveServer) -> None:
    check(
        server.post(BARE | {"model": "nobody"}),
        404,
        message="The model `nobody` does not exist or you do not have access to it.",
        error_type="invalid_request_error",
        code="model_not_found",
        param="model",
    )


def test_404_and_405_of_routes(server: LiveServer) -> None:
    with server.client() as client:
        unknown, wrong_method = client.get("/v1/nothing"), client.put("/v1/completions")
    check(
        unknown,
        404,
        message="There is nothing at GET /v1/nothing.",
        error_type="invalid_request_error",
        code="not_found",
    )
    check(
        wrong_method,
        405,
        message="PUT is not allowed here.",
        error_type="invalid_request_error",
        code="method_not_allowed",
    )


def test_409_of_a_lost_compare_and_swap_and_of_the_active_version(server: LiveServer) -> None:
    with server.client() as client:
        lost = client.patch("/v1/tasks/capital", json={"active_version": 1, "expected_version": 1})
        active = client.delete("/v1/tasks/capital/versions/2")
    check(
        lost,
        409,
        message="expected_version is 1, but the task capital exists and version 2 is active.",
        error_type="conflict_error",
        code="version_conflict",
        param="expected_version",
        should_retry="false",
    )
    check(
        active,
        409,
        message="Version 2 of capital is active: activate another one first.",
        error_type="conflict_error",
        code="version_active",
        param="version",
        should_retry="false",
    )


def test_413_counts_a_body_that_declares_nothing(data_dir: Path) -> None:
    with running_server(data_dir, max_body_bytes=2048) as live, live.client() as client:
        chunks = (b" " * 1024 for _ in range(4))
        check(
            client.post("/v1/completions", content=chunks, headers={"content-type": "application/json"}),
            413,
            message="The body is larger than 2048 bytes.",
            error_type="invalid_request_error",
            code="payload_too_large",
        )


def test_415_of_what_is_no_safetensors_file(server: LiveServer) -> None:
    answer = upload(server, file=b"PK\x03\x04 is a zip file")
    check(
        answer,
        415,
        message=answer.json()["error"]["message"],
        error_type="invalid_request_error",
        code="unsupported_file",
        param="file",
    )
    assert "safetensors" in answer.json()["error"]["message"]


def test_422_says_which_shape_was_found_and_which_is_needed(server: LiveServer) -> None:
    answer = upload(server, file=make_prompt_file(hidden_size=16), config=make_prompt_config(hidden_size=16))
    message = answer.json()["error"]["message"]
    check(answer, 422, message=message, error_type="invalid_request_error", code="prompt_mismatch", param="file")
    assert "[4, 16]" in message
    assert "8" in message.replace("[4, 16]", "")


def test_429_of_what_is_stored_is_not_to_be_tried_again(data_dir: Path) -> None:
    with running_server(data_dir, default_max_prompts=1) as live:
        assert live.upload("capital", 0.1).status_code == 201
        answer = live.upload("capital", 0.2)

    check(
        answer,
        429,
        message="The tenant would have 2 prompt versions; its quota is 1. Waiting does not help: delete versions that "
        "are not needed, or ask the operator for a larger quota.",
        error_type="rate_limit_error",
        code="storage_quota_exceeded",
        param="max_prompts",
        retry_after=30,
        should_retry="false",
    )


def test_429_says_when_to_try_again(data_dir: Path) -> None:
    with running_server(data_dir, default_requests_per_minute=2) as live:
        assert [live.post(BARE | {"max_tokens": 1}).status_code for _ in range(2)] == [200, 200]
        answer = live.post(BARE | {"max_tokens": 1})

    # Half a minute a request: the client is told at most that.
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    check(
        answer,
        429,
        message="Rate limit reached: 2 requests a minute, 0 left, 1 needed.",
        error_type="rate_limit_error",
        code="rate_limit_exceeded",
        param="requests_per_minute",
        retry_after=int(answer.headers["retry-after"]),
    )


def test_503_of_a_full_queue(data_dir: Path) -> None:
    with running_server(data_dir, max_waiting_rows=2) as live:
        live.engine.max_waiting_rows = 0
        check(
            live.post(BARE),
            503,
            message="0 rows wait already",
            error_type="service_unavailable_error",
            code="queue_full",
            retry_after=1,
        )


def test_503_while_loading(data_dir: Path) -> None:
    parts = EchoServerParts()
    parts.load_gate.clear()
    with running_server(data_dir, parts=parts, wait=False) as live:
        # Before the store is open nobody can be told from anybody.
        live.wait_until(lambda: live.post(BARE).json()["error"]["message"] != "The store is being opened.")
        check(
            live.post(BARE),
            503,
            message="The backbone is loading.",
            error_type="service_unavailable_error",
            code="loading",
            retry_after=5,
        )


def test_503_while_draining(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        drained = threading.Event()
        loop = live.runtime._loop
        assert loop is not None
        loop.call_soon_threadsafe(lambda: (live.runtime.start_drain(), drained.set()))
        assert drained.wait(10)
        check(
            live.post(BARE),
            503,
            message="The server is shutting down.",
            error_type="service_unavailable_error",
            code="draining",
            retry_after=5,
        )


def test_503_of_a_corrupt_prompt_is_not_to_be_tried_again(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        digest = live.upload("capital").json()["digest"]
        blob = next(path for path in data_dir.rglob(f"{digest}*") if path.is_file())
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")

        answer = live.post({"model": "capital", "prompt": "x"})

    check(
        answer,
        503,
        message=answer.json()["error"]["message"],
        error_type="service_unavailable_error",
        code="prompt_corrupt",
        should_retry="false",
    )


def test_503_of_a_failed_engine(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.crash("RuntimeError: boom")
        answer = live.post(BARE)
        check(
            answer,
            503,
            message=answer.json()["error"]["message"],
            error_type="service_unavailable_error",
            code="engine_failed",
            retry_after=30,
        )


def test_507_when_the_disk_is_full_and_serving_goes_on(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running_server(data_dir) as live:
        live.upload("capital", 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(FileBlobs, "put", no_space)
            refused = upload(live, file=make_prompt_file(0.7))
        served = live.post({"model": "capital", "prompt": "x"})
        with live.client() as client:
            names = [task["task"] for task in client.get("/v1/tasks").json()["data"]]

    check(
        refused,
        507,
        message="There is no space left for the prompt store; nothing was changed.",
        error_type="server_error",
        code="storage_full",
    )
    assert (served.status_code, names) == (200, ["capital"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(IsolationError("the row was ended"), "isolation_violation"), (NumericalError("not finite"), "non_finite_logits")],
)
def test_500_of_a_row_and_the_same_body_inside_a_stream(server: LiveServer, error: Any, code: str) -> None:
    body = BARE | {"prompt": "poison", "ignore_eos": True, "max_tokens": 40}
    engine = server.engine
    # Slow steps: the answer has begun before the row ends.
    engine.errors, engine.error_after, engine.step_s = {"poison": error}, 3, 0.05
    try:
        whole, streamed = server.post(body), server.post(body | {"stream": True})
    finally:
        engine.errors, engine.error_after, engine.step_s = {}, 0, 0.0

    check(whole, 500, message=error.message, error_type="server_error", code=code)
    assert streamed.status_code == 200
    *_, event, done, rest = streamed.text.split("\n\n")
    name, comment, data = event.split("\n")
    assert (name, comment, done, rest) == ("event: error", f": {error.message}", "data: [DONE]", "")
    assert json.loads(data.removeprefix("data: ")) == whole.json()
