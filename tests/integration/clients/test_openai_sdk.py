"""OpenAI's own Python client, unchanged: chat, streams, errors by class, and retries."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from prompt_store.store import PromptStore
from server.errors import IsolationError, PromptmuxError, QueueFullError, QuotaExceededError
from tests.integration.clients.tiny_server import TinyServer
from tests.unit.api.live_server import LiveServer, running_server

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hé"}]
ECHOED = "<user>hé<assistant>"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with running_server(tmp_path / "data", max_waiting_rows=2) as started:
        assert started.upload("capital").status_code == 201
        yield started


def connect(url: str, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=max_retries)


def test_chat_with_log_probabilities(tiny: TinyServer) -> None:
    with connect(tiny.url) as client:
        answer = client.chat.completions.create(
            model="front", messages=MESSAGES, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=3, n=2
        )

    assert [choice.index for choice in answer.choices] == [0, 1]
    first = answer.choices[0]
    assert first.message.role == "assistant"
    assert first.message.content is not None
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    for entry in first.logprobs.content:
        assert len(entry.top_logprobs) == 3
        # Greedy: the chosen token is the likeliest.
        assert (entry.top_logprobs[0].logprob, entry.top_logprobs[0].bytes) == (entry.logprob, entry.bytes)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.model_extra is not None
    assert answer.model_extra["prompt"]["task"] == "front"
    assert answer.system_fingerprint


def test_chat_streams_through_the_clients_own_accumulator(live: LiveServer) -> None:
    with (
        connect(live.url) as client,
        client.chat.completions.stream(
            model="capital", messages=MESSAGES, temperature=0, stream_options={"include_usage": True}
        ) as events,
    ):
        for _ in events:
            pass
        final = events.get_final_completion()

    assert final.choices[0].message.content == f"[capital@1]{ECHOED}"
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == len(f"[capital@1]{ECHOED}".encode()) + 1


def test_an_answers_message_can_be_sent_back(tiny: TinyServer) -> None:
    with connect(tiny.url) as client:
        first = client.chat.completions.create(model="front", messages=MESSAGES, max_tokens=3, temperature=0)
        answer: ChatCompletionMessageParam = first.choices[0].message.model_dump()  # type: ignore[assignment]
        second = client.chat.completions.create(
            model="front", messages=[*MESSAGES, answer, {"role": "user", "content": "more"}], max_tokens=3
        )

    assert second.choices[0].message.content is not None


def test_async_chats_at_once_each_get_their_own(live: LiveServer) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:

            async def whole() -> str | None:
                answer = await client.chat.completions.create(model="capital", messages=MESSAGES, temperature=0)
                return answer.choices[0].message.content

            async def streamed() -> str:
                chunks = await client.chat.completions.create(
                    model="tiny/echo", messages=MESSAGES, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(whole(), streamed())  # type: ignore[return-value]

    assert list(asyncio.run(ask())) == [f"[capital@1]{ECHOED}", f"[bare]{ECHOED}"]


def test_errors_have_the_clients_own_classes(live: LiveServer) -> None:
    with connect(live.url) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(
                model="capital", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="capital", messages=[{"role": "user", "content": "x" * 5000}])
        live.engine.errors = {"quota": QuotaExceededError("too many"), "broken": IsolationError("the row was ended")}
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="capital", messages=[{"role": "user", "content": "quota"}])
        with pytest.raises(openai.InternalServerError) as broken:
            client.chat.completions.create(model="capital", messages=[{"role": "user", "content": "broken"}])

    assert missing.value.code == "model_not_found"
    assert (bad.value.param, bad.value.type) == ("tools", "invalid_request_error")
    assert long.value.code == "context_length_exceeded"
    assert limited.value.code == "quota_exceeded"
    assert broken.value.code == "isolation_violation"
    assert broken.value.request_id


def test_a_used_up_quota_is_the_clients_rate_limit(tmp_path: Path) -> None:
    with (
        running_server(tmp_path / "data", default_requests_per_minute=1) as live,
        connect(live.url) as client,
    ):
        client.chat.completions.create(model="tiny/echo", messages=MESSAGES)
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="tiny/echo", messages=MESSAGES)

    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 30


def test_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data") as store:
        _, secret = store.create_key("acme", ["write"])
    with running_server(tmp_path / "data") as live:
        with connect(live.url) as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny/echo", messages=MESSAGES)
        with (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0) as client,
            pytest.raises(openai.PermissionDeniedError),
        ):
            client.chat.completions.create(model="tiny/echo", messages=MESSAGES)


@pytest.mark.parametrize(("error", "status"), [(QueueFullError("full"), 503), (QuotaExceededError("too many"), 429)])
def test_retryable_refusals_are_retried_after_the_time_given(
    live: LiveServer, error: PromptmuxError, status: int
) -> None:
    live.engine.errors = {"hé": error}

    def mend() -> None:
        live.wait_for_metric(1, "requests_total", endpoint="/v1/chat/completions", status=str(status))
        live.engine.errors = {}

    mender = threading.Thread(target=mend)
    mender.start()
    began = time.monotonic()
    with connect(live.url, max_retries=1) as client:
        answer = client.chat.completions.create(model="capital", messages=MESSAGES, temperature=0)
    mender.join()

    assert answer.choices[0].message.content == f"[capital@1]{ECHOED}"
    # The client's own first wait is half a second: it took the server's.
    assert time.monotonic() - began >= int(error.headers()["Retry-After"])
    assert live.metric("requests_total", endpoint="/v1/chat/completions", status=str(status)) == 1


def test_what_must_not_be_retried_is_asked_once(live: LiveServer) -> None:
    with live.client() as client:
        digest = client.get("/v1/tasks/capital/versions/1").json()["digest"]
    file = next(path for path in live.runtime.settings.data_dir.rglob(f"{digest}*") if path.is_file())
    file.chmod(0o600)
    file.write_bytes(b"\0" * file.stat().st_size)
    with connect(live.url, max_retries=3) as sdk, pytest.raises(openai.InternalServerError) as corrupt:
        sdk.chat.completions.create(model="capital", messages=MESSAGES)

    assert corrupt.value.code == "prompt_corrupt"
    assert corrupt.value.status_code == 503
    live.wait_for_metric(1, "requests_total", endpoint="/v1/chat/completions", status="503")
    assert live.metric("requests_total", endpoint="/v1/chat/completions", status="503") == 1


def test_error_in_mid_stream_is_raised_from_a_chat(live: LiveServer) -> None:
    live.engine.step_s = 0.01
    live.engine.errors = {"hé": IsolationError("the row was ended")}
    live.engine.error_after = 3
    with connect(live.url) as client:
        chunks = client.chat.completions.create(model="capital", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="the row was ended"):
            list(chunks)
