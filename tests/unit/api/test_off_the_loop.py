"""Work that grows with what a client sends or asks for is not done on the event loop: it would stop all streams."""

import json
import threading
from typing import Any

import pytest

from server.api import completions, sse
from server.api.completion_output import ChoiceWriter
from server.api.task_schemas import TaskObject, VersionObject
from server.api.tasks import TaskList
from server.runtime.tokens import TokenCodec
from tests.unit.api.live_server import LiveServer

SCORED = {"model": "tiny/echo", "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}


class Watched:
    """Notes in which threads some functions run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.threads: list[str] = []

    def watch(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            return real(*arguments, **named)

        self._patch.setattr(owner, name, call)

    @property
    def on_loop(self) -> list[bool]:
        return [name == "live-server" for name in self.threads]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def choices(answer: Any) -> dict[str, Any]:
    """Text and log-probabilities of the only choice, a stream's pieces put together."""
    if answer.headers["content-type"] == "application/json":
        pieces = [answer.json()["choices"][0]]
    else:
        events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-2]]
        pieces = [json.loads(event)["choices"][0] for event in events]
    found: dict[str, Any] = {"text": "".join(piece["text"] for piece in pieces)}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        found[name] = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"][name]]
    return found


@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_of_a_long_prompt_are_written_in_a_thread_and_say_the_same(
    server: LiveServer, watched: Watched, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    body = SCORED | {"prompt": "één ab " * 100, "stream": streams}
    watched.watch(ChoiceWriter, "write")
    in_thread = choices(server.post(body))
    assert watched.on_loop == [False]
    watched.threads.clear()
    monkeypatch.setattr(sse, "MAX_INLINE_ENTRIES", 10**6)
    on_loop = choices(server.post(body))

    assert watched.on_loop == [True]
    assert in_thread == on_loop
    assert len(in_thread["tokens"]) == 1 + 900 + 1


def test_log_probabilities_of_a_few_tokens_cost_no_hop(server: LiveServer, watched: Watched) -> None:
    watched.watch(ChoiceWriter, "write")
    for streams in (False, True):
        assert server.post(SCORED | {"prompt": "ab", "stream": streams}).status_code == 200

    assert watched.on_loop == [True, True]


@pytest.mark.parametrize(("num_ids", "is_in_thread"), [(100, False), (4000, True)])
def test_many_token_ids_are_looked_at_in_a_thread(
    server: LiveServer, watched: Watched, monkeypatch: pytest.MonkeyPatch, num_ids: int, is_in_thread: bool
) -> None:
    watched.watch(completions, "to_spec")
    answer = server.post({"model": "tiny/echo", "prompt": [[255] * num_ids] * 10, "max_tokens": 1})

    assert answer.status_code == 200
    assert watched.on_loop == [not is_in_thread]


def test_pages_of_tasks_and_versions_are_written_in_the_store_s_threads(server: LiveServer, watched: Watched) -> None:
    watched.watch(TaskObject, "of")
    watched.watch(VersionObject, "of")
    watched.watch(TaskList, "model_dump_json")
    with server.client() as client:
        tasks = client.get("/v1/tasks").json()["data"]
        versions = client.get("/v1/tasks/capital/versions").json()["data"]

    assert [task["task"] for task in tasks] == ["capital", "german"]
    assert [version["version"] for version in versions] == [2, 1]
    assert len(watched.threads) == 5
    assert all(name.startswith("promptmux-store") for name in watched.threads)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/tasks/capital/compare"]
)
def test_of_a_text_that_is_far_too_long_little_is_tokenised_and_that_in_a_thread(
    server: LiveServer, watched: Watched, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    num_chars: list[int] = []
    encode = TokenCodec.encode

    def counted(self: TokenCodec, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        num_chars.append(len(text))
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(TokenCodec, "encode", counted)
    watched.watch(TokenCodec, "encode")
    text = "x" * (32_768 if path.endswith("compare") else 3_000_000)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/classify": {"input": text, "labels": ["a", "b"]},
        "/v1/tasks/capital/compare": {"versions": [1, None], "inputs": [{"prompt": text}]},
    }
    model = {} if path.endswith("compare") else {"model": "capital"}
    with server.client() as client:
        answer = client.post(path, json=model | bodies[path])

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 4096 tokens" in answer.json()["error"]["message"]
    assert sum(num_chars) <= 8 * 4096
    assert watched.threads
    assert not any(watched.on_loop)
