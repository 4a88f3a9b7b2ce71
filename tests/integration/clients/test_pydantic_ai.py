"""Pydantic AI's agents over the chat route, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.integration.clients.tiny_server import TinyServer


@asynccontextmanager
async def agent_of(tiny: TinyServer, model: str = "front") -> "AsyncIterator[Agent[None, str]]":
    """An agent whose connections end with the block."""
    async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="unused", max_retries=0) as client:
        provider = OpenAIProvider(openai_client=client)
        yield Agent(
            OpenAIChatModel(model, provider=provider),
            instructions="Be kind.",
            # Whatever random weights write is a text; an empty one an agent would ask for again.
            model_settings=ModelSettings(temperature=0.0, max_tokens=8, logit_bias={"2": -100}),
        )


def expected_answer(tiny: TinyServer) -> str:
    body = {
        "model": "front", "temperature": 0, "max_tokens": 8, "logit_bias": {"2": -100},
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é?"}],
    }  # fmt: skip
    text: str = tiny.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return text


def test_an_agent_gets_its_answer_and_keeps_its_history(tiny: TinyServer) -> None:
    async def ask() -> tuple[str, str, int]:
        async with agent_of(tiny) as agent:
            first = await agent.run("é?")
            second = await agent.run("and now", message_history=first.all_messages())
        return first.output, second.output, first.usage.output_tokens

    first, second, output_tokens = asyncio.run(ask())

    assert first == expected_answer(tiny)
    assert second
    assert output_tokens == 8


def test_an_agent_streams(tiny: TinyServer) -> None:
    async def ask() -> list[str]:
        async with agent_of(tiny) as agent, agent.run_stream("é?") as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    assert "".join(asyncio.run(ask())) == expected_answer(tiny)


def test_an_unknown_task_is_the_clients_http_error(tiny: TinyServer) -> None:
    async def ask() -> None:
        async with agent_of(tiny, "nobody") as agent:
            await agent.run("x")

    with pytest.raises(ModelHTTPError) as missing:
        asyncio.run(ask())

    assert missing.value.status_code == 404
