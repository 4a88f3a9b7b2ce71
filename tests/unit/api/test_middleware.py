"""Request ids, limits of bytes, error bodies of the framework's own refusals, access lines and metric labels."""

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.store import PromptStore
from server.api.context import choose_request_id
from tests.unit.api.live_server import TIMEOUT_S, LiveServer, running_server


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 128])
def test_good_request_id_is_echoed(server: LiveServer, given: str) -> None:
    for body in ({"model": "capital", "prompt": "x"}, {"model": "nobody", "prompt": "x"}, {}):
        assert server.post(body, headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a/b", "é", "a\nb"])
def test_bad_request_id_is_replaced(given: str | None) -> None:
    made = choose_request_id(given)

    assert made != given
    assert choose_request_id(made) == made
    assert choose_request_id(given) != made


def test_streams_and_refusals_carry_an_id(server: LiveServer) -> None:
    with server.client() as client:
        answers = [
            server.post({"model": "capital", "prompt": "x", "stream": True}),
            client.get("/nope"),
            client.put("/v1/completions"),
            client.post("/v1/completions", content=b"x" * 5_000_000),
        ]

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 4


def test_no_such_route_is_an_error_body(server: LiveServer) -> None:
    with server.client() as client:
        for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/", "/v2/completions", "/v1/tasks/a/b/c"):
            response = client.get(path)
            assert response.status_code == 404, path
            assert response.json()["error"]["code"] == "not_found"


def test_no_such_method_is_an_error_body_with_allow(server: LiveServer) -> None:
    with server.client() as client:
        for method, path, allowed in (
            ("GET", "/v1/completions", "POST"),
            ("DELETE", "/livez", "GET, HEAD"),
            ("OPTIONS", "/v1/models", "GET, HEAD"),
            ("PUT", "/v1/tasks/capital", "DELETE, GET, HEAD, PATCH"),
            ("PATCH", "/v1/tasks/capital/versions", "GET, HEAD, POST"),
        ):
            response = client.request(method, path)
            assert response.status_code == 405
            assert response.json()["error"]["code"] == "method_not_allowed"
            assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/v1/models", 200),
        ("/v1/tasks/capital/versions/1/file", 200),
        ("/v1/tasks/nobody", 404),
        ("/v1/completions", 405),
    ],
)
def test_head_is_answered_as_get_is_without_the_body(server: LiveServer, path: str, status: int) -> None:
    with server.client() as client:
        got, headed = client.get(path), client.head(path)
        assert client.get("/livez").status_code == 200, "the connection serves on"

    assert (headed.status_code, headed.content) == (status, b"")
    assert got.status_code == status
    for name in ("content-type", "content-length", "etag", "allow"):
        assert headed.headers.get(name) == got.headers.get(name)


def test_head_needs_a_key_where_get_does(data_dir: Path) -> None:
    with PromptStore.open(data_dir) as store:
        _, secret = store.create_key("acme", ["infer"])
    with running_server(data_dir) as live, live.client() as client:
        key = {"authorization": f"Bearer {secret}"}
        assert client.head("/v1/models").status_code == 401
        assert client.head("/v1/models", headers=key).status_code == 200
        assert client.head("/v1/keys", headers=key).status_code == 403


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running_server(tmp_path_factory.mktemp("data"), max_body_bytes=2048, max_upload_bytes=20_000) as live:
        yield live


def test_body_up_to_the_limit_is_read(limited: LiveServer) -> None:
    body = json.dumps({"model": "tiny/echo", "prompt": "x"}).encode()
    with limited.client() as client:
        for size, status in ((2048, 200), (2049, 413)):
            response = client.post(
                "/v1/completions", content=body.ljust(size), headers={"content-type": "application/json"}
            )
            assert response.status_code == status


def test_declared_length_is_refused_before_anything_is_sent(limited: LiveServer) -> None:
    started_s = time.perf_counter()
    with socket.create_connection(("127.0.0.1", limited.port), TIMEOUT_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10000000000\r\nExpect: 100-continue\r\n\r\n"
        )
        received = b""
        while not received.endswith(b"}}"):
            received += connection.recv(65536)

    assert received.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in received
    assert b"connection: close" in received.lower()
    assert time.perf_counter() - started_s < 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/tasks/huge/versions"])
def test_body_without_a_length_is_refused_as_soon_as_it_is_too_large(limited: LiveServer, path: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        if path.endswith("versions"):
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while sent < 10_000_000_000:
            sent += 65536
            yield b"x" * 65536

    content_type = "multipart/form-data; boundary=b" if path.endswith("versions") else "application/json"
    with limited.client() as client:
        response = client.post(path, content=endless(), headers={"content-type": content_type})
        assert client.get("/v1/tasks").json()["data"] == []

    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert sent < 200_000_000


def test_connection_serves_on_after_a_small_refusal(server: LiveServer) -> None:
    with server.client() as client:
        for _ in range(3):
            assert client.post("/v1/completions", content=b"{").status_code == 400
            assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("length", ["-1", "abc", "1" * 30])
def test_odd_content_length_is_refused(server: LiveServer, length: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        status = connection.recv(65536).split(b" ")[1]

    assert status in (b"400", b"413")


def test_metrics_label_the_template_and_never_the_path(server: LiveServer) -> None:
    with server.client() as client:
        client.get("/v1/tasks/capital")
        client.get("/v1/tasks/some-unknown-name")
        client.get("/some/unknown/path")
        client.get("/v1/models/tiny/echo")
        text = client.get("/metrics").text

    server.wait_for_metric(1, "requests_total", endpoint="/v1/tasks/{task}", status="200")
    server.wait_for_metric(1, "requests_total", endpoint="/v1/tasks/{task}", status="404")
    server.wait_for_metric(1, "requests_total", endpoint="other", status="404")
    server.wait_for_metric(1, "requests_total", endpoint="/v1/models/{model:path}", status="200")
    assert "unknown" not in text
    assert 'task="' not in text


def test_rejections_are_counted_by_code(server: LiveServer) -> None:
    before = server.metric("requests_rejected_total", reason="model_not_found")
    server.post({"model": "nobody", "prompt": "x"})

    server.wait_for_metric(before + 1, "requests_rejected_total", reason="model_not_found")


def access_line(log: io.StringIO, request_id: str) -> dict[str, object]:
    found = [json.loads(line) for line in log.getvalue().splitlines() if request_id in line]
    assert len(found) == 1
    line: dict[str, object] = found[0]
    return line


@pytest.mark.parametrize("streams", [False, True])
def test_access_line_tells_all_but_the_prompt(server: LiveServer, log_lines: io.StringIO, streams: bool) -> None:
    request_id = f"line-{streams}"
    answer = server.post(
        {"model": "capital", "prompt": "very private words", "max_tokens": 4, "stream": streams},
        headers={"x-request-id": request_id},
    )
    server.wait_until(lambda: request_id in log_lines.getvalue())

    line = access_line(log_lines, request_id)
    assert line["endpoint"] == "/v1/completions"
    assert line["status"] == 200
    assert line["tenant"] == "default"
    assert line["task"] == "capital"
    assert line["digest"] == answer.headers["x-prompt-digest"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (19, 4)
    assert line["finish_reason"] == "length"
    assert isinstance(line["ttft_ms"], float)
    assert isinstance(line["e2e_ms"], float)
    assert "private" not in log_lines.getvalue()


def test_access_line_of_a_refusal_names_the_code(server: LiveServer, log_lines: io.StringIO) -> None:
    server.post({"model": "nobody", "prompt": "x"}, headers={"x-request-id": "refused"})
    server.wait_until(lambda: "refused" in log_lines.getvalue())

    assert access_line(log_lines, "refused")["error_code"] == "model_not_found"


def test_refused_upload_leaves_no_file_behind(data_dir: Path) -> None:
    with running_server(data_dir, max_upload_bytes=4096) as live:
        before = sorted(path for path in data_dir.rglob("*") if path.is_file())
        with live.client() as client:
            response = client.post("/v1/tasks/huge/versions", files={"file": b"x" * 3_000_000, "config": b"{}"})
        after = sorted(path for path in data_dir.rglob("*") if path.is_file())

    assert response.status_code == 413
    assert before == after
