"""Bodies that arrive slowly, or never to their end: they hold up nobody else, and are no errors of the server."""

import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.api.live_server import TIMEOUT_S, LiveServer, running_server

UPLOAD = ("/v1/tasks/slow/versions", "multipart/form-data; boundary=b")
COMPLETION = ("/v1/completions", "application/json")
HALF = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nxxx'


@contextmanager
def half_sent(live: LiveServer, path: str, content_type: str) -> Iterator[socket.socket]:
    """A request whose handler reads its body already, and gets only the beginning of it."""
    with socket.create_connection(("127.0.0.1", live.port), TIMEOUT_S) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
            "Content-Length: 10000\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        # Sent when the body is asked for.
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(HALF if "multipart" in content_type else b'{"model"')
        yield connection


def test_half_sent_uploads_do_not_hold_up_a_whole_one(server: LiveServer) -> None:
    with half_sent(server, *UPLOAD), half_sent(server, *UPLOAD), half_sent(server, *UPLOAD):
        assert server.upload("brisk", 0.4).status_code == 201


def read_to_the_end(connection: socket.socket) -> tuple[bytes, Any]:
    """The head of the answer and the error in its body, once the server has closed the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), json.loads(body)["error"]


def test_upload_that_does_not_arrive_in_time_is_refused_and_its_connection_closed(data_dir: Path) -> None:
    with running_server(data_dir, upload_timeout_s=0.1) as live, half_sent(live, *UPLOAD) as connection:
        head, error = read_to_the_end(connection)
        live.wait_for_metric(1, "prompt_uploads_total", result="upload_timeout")
        assert live.upload("brisk", 0.4).status_code == 201

    assert head.startswith(b"http/1.1 408 ")
    assert b"connection: close" in head
    assert (error["type"], error["code"]) == ("invalid_request_error", "upload_timeout")


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running_server(tmp_path_factory.mktemp("data"), body_timeout_s=0.2, upload_timeout_s=0.2) as live:
        yield live


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/tasks/a/compare"])
def test_body_that_does_not_arrive_in_time_is_refused_and_its_connection_closed(hasty: LiveServer, path: str) -> None:
    with half_sent(hasty, path, "application/json") as connection:
        head, error = read_to_the_end(connection)

    assert head.startswith(b"http/1.1 408 ")
    assert b"connection: close" in head
    assert error == {
        "message": "The body did not arrive within 0.2 seconds.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_timeout",
    }
    hasty.wait_for_metric(1, "requests_total", endpoint=path.replace("/a/", "/{task}/"), status="408")
    hasty.wait_for_metric(1, "requests_rejected_total", reason="request_timeout")


def test_a_byte_now_and_then_buys_no_more_time(hasty: LiveServer) -> None:
    with half_sent(hasty, *COMPLETION) as connection:
        connection.settimeout(0.02)
        received = b""
        sent = 0
        while not received:
            connection.sendall(b" ")
            sent += 1
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
            assert sent < 1000, "the server waits for ever"

    assert received.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("request_", "code"), [(COMPLETION, "request_timeout"), (UPLOAD, "upload_timeout")])
def test_nothing_but_a_head_is_refused_too(hasty: LiveServer, request_: tuple[str, str], code: str) -> None:
    path, content_type = request_
    with socket.create_connection(("127.0.0.1", hasty.port), TIMEOUT_S) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n".encode()
            + b"Content-Length: 10\r\n\r\n"
        )
        head, error = read_to_the_end(connection)

    assert head.startswith(b"http/1.1 408 ")
    assert b"connection: close" in head
    assert error["code"] == code


def test_answer_may_take_longer_than_the_body_may(hasty: LiveServer) -> None:
    engine = hasty.engine
    engine.step_s = 0.05
    try:
        for streams in (False, True):
            answer = hasty.post({"model": "tiny/echo", "prompt": "x" * 12, "max_tokens": 12, "stream": streams})
            assert answer.status_code == 200
            assert "error" not in answer.text
    finally:
        engine.step_s = 0.0


def test_client_that_leaves_after_the_time_for_its_body_is_missed_all_the_same(hasty: LiveServer) -> None:
    body = json.dumps({"model": "tiny/echo", "prompt": "x"}).encode()
    hasty.engine.gate.clear()
    try:
        with socket.create_connection(("127.0.0.1", hasty.port), TIMEOUT_S) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            hasty.engine.wait_for(lambda engine: engine.num_rows == 1)
            # Longer than the limit, however much longer.
            time.sleep(0.3)
        hasty.engine.wait_for(lambda engine: engine.num_rows == 0)
    finally:
        hasty.engine.gate.set()


@pytest.mark.parametrize(
    ("request_", "endpoint"), [(UPLOAD, "/v1/tasks/{task}/versions"), (COMPLETION, "/v1/completions")]
)
def test_client_that_leaves_in_mid_body_is_counted_as_gone(
    server: LiveServer, log_lines: io.StringIO, request_: tuple[str, str], endpoint: str
) -> None:
    logged = len(log_lines.getvalue())
    gone = server.metric("client_disconnects_total")
    closed, failed = (server.metric("requests_total", endpoint=endpoint, status=status) for status in ("499", "500"))
    with half_sent(server, *request_):
        pass

    server.wait_for_metric(closed + 1, "requests_total", endpoint=endpoint, status="499")
    assert server.metric("client_disconnects_total") == gone + 1
    assert server.metric("requests_total", endpoint=endpoint, status="500") == failed
    assert "unexpected_error" not in log_lines.getvalue()[logged:]
