"""Streams of a real server are timed token by token, and whatever goes wrong on the way has a name."""

import asyncio
import json
import socket
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from prompt_store.store import PromptStore
from server.bench.load import Answer
from server.bench.online import (
    BAD_STREAM,
    CONNECT_ERROR,
    CONNECTION_LOST,
    STREAM_CUT,
    TIMEOUT,
    CompletionStream,
    OnlineTarget,
)
from server.bench.sse import Event
from server.bench.workload import BenchRequest
from server.errors import IsolationError
from tests.fakes import EchoBackbone
from tests.unit.api.live_server import LiveServer
from tests.unit.bench.conftest import RawServer


def answers(
    url: str,
    *requests: BenchRequest,
    tasks: Sequence[str] = (),
    key: str | None = None,
    backbone: str = EchoBackbone.name,
    timeout_s: float = 20.0,
) -> list[Answer]:
    async def run() -> list[Answer]:
        async with OnlineTarget(url, key, backbone=backbone, tasks=tasks, read_timeout_s=timeout_s) as target:
            return await asyncio.gather(*(target.answer(request) for request in requests))

    return asyncio.run(run())


def failure_kind(answer: Answer) -> str:
    assert answer.failure is not None
    return answer.failure.kind


def test_every_token_of_a_real_stream_has_its_time(live: LiveServer) -> None:
    (answer,) = answers(live.url, BenchRequest(None, tuple(b"hello"), 9))

    assert answer.failure is None
    assert len(answer.token_times_s) == 9
    assert all(a <= b for a, b in pairwise([*answer.token_times_s, answer.ended_s]))


def test_tokens_whose_text_is_held_back_are_counted_all_the_same(live: LiveServer) -> None:
    # Bytes 0xF0 0x9F … begin characters that never end: their text comes late, or as one mark for several.
    (answer,) = answers(live.url, BenchRequest(None, (0xF0, 0x9F, 0x98, 0xC3, 0x41), 30))

    assert len(answer.token_times_s) == 30


def test_requests_go_to_the_task_of_their_prompt(live: LiveServer) -> None:
    for task in ("first", "second"):
        assert live.upload(task, 0.25 if task == "first" else 0.75).is_success
    found = answers(
        live.url, *(BenchRequest(prompt, (65, 66), 3) for prompt in (1, None, 0)), tasks=["first", "second@1"]
    )

    assert all(answer.failure is None for answer in found)
    asked = {row.prompt.task if row.prompt is not None else None for row in live.engine.submitted}
    assert asked == {"first", "second", None}
    (row,) = [row for row in live.engine.submitted if row.prompt is None]
    assert (row.token_ids, row.sampling.max_tokens) == ((65, 66), 3)
    assert (row.sampling.temperature, row.sampling.ignore_eos) == (0.0, True)


def test_refusals_are_named_by_the_server_s_code(live: LiveServer) -> None:
    unknown, range_, long = (
        *answers(live.url, BenchRequest(0, (65,), 3), tasks=["nobody"]),
        *answers(live.url, BenchRequest(None, (1000,), 3)),
        *answers(live.url, BenchRequest(None, (65,), 5000)),
    )

    assert [failure_kind(a) for a in (unknown, range_, long)] == [
        "model_not_found",
        "invalid_request",
        "context_length_exceeded",
    ]
    assert [a.failure.status for a in (unknown, range_, long) if a.failure] == [404, 400, 400]
    assert "prompt.0" in (range_.failure.message if range_.failure else "")
    assert all(not a.token_times_s for a in (unknown, range_, long))


def test_a_row_that_the_engine_ends_fails_alone(live: LiveServer) -> None:
    live.engine.errors = {"poison": IsolationError("the row was ended")}
    bad, good = answers(live.url, BenchRequest(None, tuple(b"poison"), 9), BenchRequest(None, tuple(b"fine"), 9))

    assert failure_kind(bad) == "isolation_violation"
    assert good.failure is None
    assert len(good.token_times_s) == 9


def test_a_key_is_sent(live: LiveServer, tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data", exclusive=False) as store:
        _, secret = store.create_key("default", ("infer",))
    request = BenchRequest(None, (65,), 1)
    # The server notices within a second that there is a key now.
    live.wait_until(lambda: failure_kind_or_none(answers(live.url, request)[0]) is not None)

    assert failure_kind(answers(live.url, request, key="wrong")[0]) == "invalid_api_key"
    assert answers(live.url, request, key=secret)[0].failure is None


def failure_kind_or_none(answer: Answer) -> str | None:
    return None if answer.failure is None else answer.failure.kind


def test_no_server_is_a_connect_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (answer,) = answers(f"http://127.0.0.1:{taken.getsockname()[1]}", BenchRequest(None, (65,), 1))

    assert failure_kind(answer) == CONNECT_ERROR


def test_a_server_that_stays_silent_is_given_up(live: LiveServer) -> None:
    live.engine.gate.clear()
    (answer,) = answers(live.url, BenchRequest(None, (65,), 1), timeout_s=0.05)
    live.engine.gate.set()

    assert failure_kind(answer) == TIMEOUT


CHUNK = b'data: {"choices":[{"text":"a"}],"usage":{"completion_tokens":1}}\n\n'
ERROR = b'event: error\n: dead\ndata: {"error":{"message":"dead","code":"engine_failed"}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("reply", "kind", "num_tokens"),
    [
        (HEAD + b"\r\n" + CHUNK + b"data: [DONE]\n\n", None, 1),
        (HEAD + b"\r\n" + CHUNK + ERROR + b"data: [DONE]\n\n", "engine_failed", 1),
        (HEAD + b"\r\n" + CHUNK, STREAM_CUT, 1),
        (HEAD + b"\r\n" + CHUNK + b"data: [DO", STREAM_CUT, 1),
        (HEAD + b"Content-Length: 900\r\n\r\n" + CHUNK, CONNECTION_LOST, 1),
        (HEAD + b"\r\ndata: {no json\n\ndata: [DONE]\n\n", BAD_STREAM, 0),
        (HEAD + b"\r\ndata: [1]\n\ndata: [DONE]\n\n", BAD_STREAM, 0),
        (HEAD + b'\r\ndata: {"usage":{}}\n\ndata: [DONE]\n\n', BAD_STREAM, 0),
        (b"", CONNECTION_LOST, 0),
        (b"no HTTP at all", CONNECTION_LOST, 0),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops",
            BAD_STREAM,
            0,
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops", "http_502", 0),
    ],
)
def test_broken_streams_are_named_and_never_pass_for_whole(
    raw_server: RawServer, reply: bytes, kind: str | None, num_tokens: int
) -> None:
    with raw_server(reply) as url:
        (answer,) = answers(url, BenchRequest(None, (65,), 4))

    assert failure_kind_or_none(answer) == kind
    assert len(answer.token_times_s) == num_tokens


def stream_of(*chunks: tuple[float, dict[str, object]]) -> CompletionStream:
    now_s = [0.0]
    stream = CompletionStream(lambda: now_s[0])
    for at_s, chunk in chunks:
        now_s[0] = at_s
        stream.take(Event("message", json.dumps(chunk)))
    return stream


def chunk_of(num_tokens: int, **more: object) -> dict[str, object]:
    return {"choices": [{"text": "x"}], "usage": {"completion_tokens": num_tokens, **more}}


def test_tokens_that_come_together_share_the_gap_before_them() -> None:
    stream = stream_of((1.0, chunk_of(1)), (4.0, chunk_of(4)), (5.0, chunk_of(4)), (6.0, chunk_of(5)))

    assert stream.token_times_s == pytest.approx([1.0, 2.0, 3.0, 4.0, 6.0])


def test_servers_that_give_the_usage_at_the_end_alone_are_counted_by_chunks_and_then_by_it() -> None:
    text: dict[str, object] = {"choices": [{"text": "x"}]}
    stream = stream_of((1.0, text), (2.0, text), (3.0, {"choices": [], "usage": {"completion_tokens": 3}}))

    assert stream.token_times_s == pytest.approx([1.0, 2.0, 3.0])


def test_cached_tokens_of_the_last_usage_are_kept() -> None:
    stream = stream_of(
        (1.0, chunk_of(1, prompt_tokens_details={"cached_tokens": 16})),
        (2.0, {"choices": [{"text": "x"}]}),
        (3.0, chunk_of(2, prompt_tokens_details=None)),
    )
    assert stream.num_cached_tokens == 0
    assert stream_of((1.0, chunk_of(1, prompt_tokens_details={"cached_tokens": 16}))).num_cached_tokens == 16


def test_metrics_are_read_where_they_can_be(live: LiveServer) -> None:
    async def read(url: str) -> str | None:
        async with OnlineTarget(url, None, backbone="b", tasks=[]) as target:
            return await target.metrics()

    assert "promptmux_step_seconds" in (asyncio.run(read(live.url)) or "")
    assert asyncio.run(read(f"{live.url}/nowhere")) is None
    assert asyncio.run(read("http://127.0.0.1:1")) is None
