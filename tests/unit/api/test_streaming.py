"""Server-sent events byte for byte, and what becomes of rows whose reader leaves, stops reading, or is cut off."""

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from server.api.completion_schemas import CompletionChunk
from server.errors import IsolationError, NumericalError
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import TIMEOUT_S, LiveServer, running_server

ENDLESS = {"model": "tiny/echo", "prompt": "x", "ignore_eos": True, "max_tokens": 4000, "temperature": 0}


def stream(server: LiveServer, body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The raw text of a streamed completion and the data of its events, `[DONE]` left out."""
    response = server.post(body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    assert response.text.endswith("data: [DONE]\n\n")
    events = response.text.split("\n\n")[:-2]
    assert all(event.startswith("data: {") for event in events)
    return response.text, [json.loads(event.removeprefix("data: ")) for event in events]


def test_stream_is_byte_exact(server: LiveServer) -> None:
    response = server.post({"model": "capital", "prompt": "x", "max_tokens": 1, "temperature": 0, "stream": True})

    digest = response.headers["x-prompt-digest"]
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    assert (
        response.content
        == (
            f'data: {{"id":"{first["id"]}","object":"text_completion","created":{first["created"]},"model":"capital",'
            f'"system_fingerprint":"{"f" * 64}",'
            f'"prompt":{{"task":"capital","version":2,"digest":"{digest}"}},'
            '"choices":[{"index":0,"text":"[","logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
            "data: [DONE]\n\n"
        ).encode()
    )


def test_chunks_add_up_to_the_answer_without_streaming(server: LiveServer) -> None:
    body = {
        "model": "capital", "prompt": ["één", "日本"], "n": 2, "temperature": 0, "max_tokens": 64,
        "echo": True, "logprobs": 3,
    }  # fmt: skip
    whole = server.post(body).json()

    _, chunks = stream(server, body)

    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for c in mine if c["logprobs"] for value in c["logprobs"][name]] == values
    for chunk in chunks:
        assert CompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk


def test_include_usage_adds_a_chunk_without_choices(server: LiveServer) -> None:
    body = {"model": "capital", "prompt": "x", "temperature": 0, "max_tokens": 64}

    _, chunks = stream(server, body | {"stream_options": {"include_usage": True}})

    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == server.post(body).json()["usage"]


def test_continuous_usage_grows_to_the_whole(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.01
        body = {"model": "tiny/echo", "prompt": "x", "temperature": 0, "max_tokens": 5}
        _, chunks = stream(live, body | {"stream_options": {"continuous_usage_stats": True}})

    used = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert used == sorted(used)
    assert len(used) > 1
    assert used[-1] == 5
    assert chunks[-1]["choices"] != []


def test_tasks_stream_names_the_task_in_each_choice(server: LiveServer) -> None:
    _, chunks = stream(server, {"tasks": ["capital", "german@1"], "prompt": "x", "temperature": 0})

    for chunk in chunks:
        choice = chunk["choices"][0]
        assert choice["task"] == ("capital", "german@1")[choice["index"]]
        assert choice["prompt"]["task"] == ("capital", "german")[choice["index"]]
        assert chunk["prompt"] is None


def test_rows_of_one_step_share_a_send(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.gate.clear()
        connection = open_stream(live, {"model": "tiny/echo", "prompt": ["a", "b", "c"], "max_tokens": 1})
        live.engine.wait_for(lambda engine: engine.num_rows == 3)
        live.engine.gate.set()
        received = read_all(connection)

    # In HTTP/1.1 chunked coding each send is one chunk.
    chunks = received.split(b"\r\n\r\n", 1)[1].split(b"\r\n")[1::2]
    assert chunks[0].count(b"data: {") == 3
    assert chunks[0].endswith(b"data: [DONE]\n\n")


def test_silent_stream_carries_pings(data_dir: Path) -> None:
    with running_server(data_dir, ping_interval_s=0.05) as live:
        live.engine.gate.clear()
        connection = open_stream(live, ENDLESS | {"max_tokens": 2})
        received = read_until(connection, b": ping\n\n")
        live.engine.gate.set()
        received += read_all(connection)

    assert b"\n: ping\n\n" in received
    assert b"data: [DONE]\n\n" in received
    assert b"id:" not in received.replace(b'"id":', b"").split(b"\r\n\r\n", 1)[1]
    assert b"retry:" not in received


def test_failure_in_mid_stream_is_an_error_event_then_done(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.01
        live.engine.errors = {"poison": IsolationError("the row was\nended")}
        live.engine.error_after = 3
        response = live.post({"model": "tiny/echo", "prompt": "poison", "stream": True, "temperature": 0})
        live.wait_until_idle()

    assert response.status_code == 200
    error = (
        '{"error":{"message":"the row was\\nended","type":"server_error","param":null,"code":"isolation_violation"}}'
    )
    assert response.text.endswith(f"\n\nevent: error\n: the row was ended\ndata: {error}\n\ndata: [DONE]\n\n")


def test_failure_of_one_row_ends_the_streams_other_rows(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.01
        live.engine.errors = {"poison": NumericalError("not finite")}
        live.engine.error_after = 2
        response = live.post(ENDLESS | {"prompt": ["poison", "innocent"], "stream": True})

        assert response.text.count("event: error") == 1
        live.engine.wait_for(lambda engine: engine.num_rows == 0)


@pytest.mark.parametrize("prompt", ["poison", ["innocent", "poison"]])
def test_error_in_the_first_output_is_the_status(server: LiveServer, prompt: Any) -> None:
    server.engine.errors = {"poison": NumericalError("not finite")}
    try:
        response = server.post(ENDLESS | {"prompt": prompt, "stream": True})
    finally:
        server.engine.errors = {}

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "non_finite_logits"


def test_request_refused_at_submission_has_its_status(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.start_drain()
        response = live.post(ENDLESS | {"stream": True})

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("holds", [True, False])
def test_rows_of_a_client_that_left_are_cancelled(data_dir: Path, streams: bool, holds: bool) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.005
        if holds:
            live.engine.gate.clear()
        connection = open_stream(live, ENDLESS | {"n": 2, "stream": streams})
        live.engine.wait_for(lambda engine: engine.num_rows == 2)
        if streams and not holds:
            read_until(connection, b"data: ")
        connection.close()

        live.engine.wait_for(lambda engine: engine.num_rows == 0)
        assert {row.row_id for row in live.engine.submitted} == live.engine.cancelled
        live.wait_until_idle()
        live.wait_until(lambda: live.metric("client_disconnects_total") == 1)


def test_finished_request_is_no_disconnect(server: LiveServer) -> None:
    before = server.metric("client_disconnects_total")
    for streams in (True, False):
        server.post({"model": "tiny/echo", "prompt": "x", "stream": streams})
    server.wait_until_idle()

    assert server.metric("client_disconnects_total") == before
    assert not server.engine.cancelled & {row.row_id for row in server.engine.submitted[-2:]}


def test_reader_that_stops_is_cancelled_and_holds_little_memory(data_dir: Path) -> None:
    parts = EchoServerParts(max_model_len=200_000)
    with running_server(data_dir, parts=parts, slow_reader_timeout_s=0.3) as live:
        # Half a minute of steps: the rows must not end by themselves before the sockets are full.
        live.engine.step_s = 0.002
        connection = socket.create_connection(("127.0.0.1", live.port), TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send_request(connection, ENDLESS | {"n": 8, "stream": True, "max_tokens": 16_000, "logprobs": 20})
        live.engine.wait_for(lambda engine: engine.num_rows == 8)
        most_pending = 0

        def is_cancelled() -> bool:
            nonlocal most_pending
            running = next(iter(live.runtime._in_flight._of_row.values()), None)
            if running is not None:
                most_pending = max(most_pending, running.stream.num_pending)
            return len(live.engine.cancelled) == 8

        live.wait_until(is_cancelled)
        live.wait_until_idle()
        live.wait_until(lambda: live.metric("client_disconnects_total") == 1)
        connection.close()

        assert most_pending <= 16 * 8
        assert live.post({"model": "tiny/echo", "prompt": "x"}).status_code == 200


def test_slow_but_reading_client_gets_everything(data_dir: Path) -> None:
    with running_server(data_dir, slow_reader_timeout_s=5) as live:
        # About 20 MB, far more than sockets hold.
        body = ENDLESS | {"n": 4, "logprobs": 20, "stream_options": {"include_usage": True}}
        connection = open_stream(live, body)
        live.engine.wait_for(lambda engine: len(engine.submitted) == 4 and engine.num_rows == 0)
        received = read_all(connection)

    assert b'"completion_tokens":16000' in received
    assert b"data: [DONE]" in received


def test_engine_that_dies_ends_streams_with_the_error_event(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.005
        connection = open_stream(live, ENDLESS)
        read_until(connection, b"data: ")
        # It does not even tell its rows: the runtime notices by itself.
        live.engine.crash("RuntimeError: boom", silently=True)
        received = read_all(connection)

    assert b"event: error\n" in received
    assert b'"code":"engine_failed"' in received
    assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]")


def test_stop_ends_running_streams_with_the_error_event(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.005
        connection = open_stream(live, ENDLESS)
        read_until(connection, b"data: ")
        loop = live.runtime._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(live.runtime.stop(), loop).result(TIMEOUT_S)
        received = read_all(connection)
        refused = live.post(ENDLESS)

    assert b"event: error\n" in received
    assert b'"code":"draining"' in received
    assert b"data: [DONE]\n\n" in received
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"


def test_many_streams_at_once_each_get_their_own(server: LiveServer) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"model": ("capital", "german", "tiny/echo")[number % 3], "prompt": f"q{number}", "temperature": 0}
        _, chunks = stream(server, body | {"max_tokens": 64})
        texts[number] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    names = ("[capital@2]", "[german@1]", "[bare]")
    assert texts == {number: f"{names[number % 3]}q{number}" for number in range(24)}


def send_request(connection: socket.socket, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    connection.sendall(head.encode() + content)


def open_stream(server: LiveServer, body: dict[str, Any]) -> socket.socket:
    """A raw connection on which a request was sent, so that the test decides what is read."""
    connection = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)
    send_request(connection, {"stream": True, **body})
    return connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        news = connection.recv(65536)
        assert news, received
        received += news
    return received


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with connection:
        while news := connection.recv(65536):
            received += news
    return received
