"""Bodies that arrive slowly, or never to their end: they hold up nobody else, and are no errors of the server."""

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def test_upload_that_does_not_arrive_in_time_is_refused_and_its_connection_closed(data_dir: Path) -> None:
    with running_server(data_dir, upload_timeout_s=0.1) as live, half_sent(live, *UPLOAD) as connection:
        received = b""
        while piece := connection.recv(65536):
            received += piece
        live.wait_for_metric(1, "prompt_uploads_total", result="upload_timeout")
        assert live.upload("brisk", 0.4).status_code == 201

    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "upload_timeout"


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
