"""OpenAI's own Python client, unchanged, against a real port."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server.errors import IsolationError
from tests.unit.api.live_server import LiveServer, running_server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="capital", prompt="France", temperature=0, max_tokens=64, logprobs=1)

    assert answer.choices[0].text == "[capital@2]France"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7
    assert answer.model_extra is not None
    assert answer.model_extra["prompt"]["task"] == "capital"


def test_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="capital", prompt="x", temperature=0, max_tokens=64, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip

    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "[capital@2]x"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 13


def test_extensions_travel_in_extra_body(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="capital", prompt="x", temperature=0, extra_body={"tasks": ["capital", "german"], "top_k": 5}
    )

    assert [choice.text for choice in answer.choices] == ["[capital@2]x", "[german@1]x"]


def test_async_completion_and_stream(server: LiveServer) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            whole = await client.completions.create(model="german", prompt="x", temperature=0)
            pieces = await client.completions.create(model="german", prompt="x", temperature=0, stream=True)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in pieces])

    assert asyncio.run(ask()) == ("[german@1]x", "[german@1]x")


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    models = client.models.list().data

    assert [model.id for model in models] == ["tiny/echo", "capital", "german"]
    assert client.models.retrieve("capital").owned_by == "default"
    assert client.models.retrieve("tiny/echo").id == "tiny/echo"


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="capital", prompt="x", n=9)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")

    assert missing.value.code == "model_not_found"
    assert bad.value.param == "n"
    assert bad.value.request_id


def test_error_in_mid_stream_is_raised(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.01
        live.engine.errors = {"poison": IsolationError("the row was ended")}
        live.engine.error_after = 3
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
            pieces = client.completions.create(model="tiny/echo", prompt="poison", stream=True)
            with pytest.raises(openai.APIError, match="the row was ended"):
                list(pieces)


def test_client_that_leaves_a_stream_cancels_its_row(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.005
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
            pieces = client.completions.create(
                model="tiny/echo", prompt="x", stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
            )
            next(iter(pieces))
            pieces.close()

        live.engine.wait_for(lambda engine: engine.num_rows == 0 and len(engine.cancelled) == 1)
