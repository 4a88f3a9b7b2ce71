"""LangChain's client for OpenAI's API, unchanged, as chat model and as completions model."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.integration.clients.tiny_server import TinyServer


@pytest.fixture
def http_client() -> Iterator[httpx.Client]:
    """LangChain's own is kept open for as long as the process lives."""
    with httpx.Client() as client:
        yield client


@pytest.fixture
def chat(tiny: TinyServer, http_client: httpx.Client) -> ChatOpenAI:
    return make_chat(tiny, http_client=http_client)


def make_chat(tiny: TinyServer, **clients: httpx.Client | httpx.AsyncClient) -> ChatOpenAI:
    return ChatOpenAI(
        model="front",
        base_url=f"{tiny.url}/v1",
        api_key="unused",
        temperature=0,
        max_completion_tokens=8,
        max_retries=0,
        **clients,  # type: ignore[arg-type]
    )


def test_messages_of_all_roles_are_answered(tiny: TinyServer, chat: ChatOpenAI) -> None:
    messages = [SystemMessage("Be kind."), HumanMessage("é?"), AIMessage("no"), HumanMessage("and now")]
    expected = tiny.post(
        "/v1/chat/completions",
        {
            "model": "front", "temperature": 0, "max_tokens": 8,
            "messages": [
                {"role": "system", "content": "Be kind."}, {"role": "user", "content": "é?"},
                {"role": "assistant", "content": "no"}, {"role": "user", "content": "and now"},
            ],
        },
    )  # fmt: skip

    answer = chat.invoke(messages)

    assert answer.text == expected["choices"][0]["message"]["content"]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == expected["usage"]["total_tokens"]
    assert answer.response_metadata["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert answer.response_metadata["system_fingerprint"] == expected["system_fingerprint"]


def test_a_stream_adds_up_to_the_answer(chat: ChatOpenAI) -> None:
    whole = chat.invoke("é?")

    pieces = list(chat.stream("é?", stream_usage=True))

    assert "".join(piece.text for piece in pieces) == whole.text
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert [usage["output_tokens"] for usage in used] == [whole.usage_metadata["output_tokens"]]  # type: ignore[index]


def test_a_batch_runs_at_once(tiny: TinyServer, chat: ChatOpenAI) -> None:
    questions = ["a", "bb", "ccc"]

    async def ask() -> list[str]:
        async with httpx.AsyncClient() as client:
            answers = await make_chat(tiny, http_async_client=client).abatch(questions)
        return [answer.text for answer in answers]

    assert asyncio.run(ask()) == [chat.invoke(question).text for question in questions]


def test_log_probabilities_come_with_the_answer(chat: ChatOpenAI) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("x")

    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]  # type: ignore[index]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_tools_are_refused_in_the_clients_own_words(chat: ChatOpenAI) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        chat.bind_tools([weather]).invoke("x")


def test_texts_are_completed(tiny: TinyServer, http_client: httpx.Client) -> None:
    model = OpenAI(
        model="layers",
        base_url=f"{tiny.url}/v1",
        api_key="unused",
        temperature=0,
        max_tokens=6,
        http_client=http_client,
    )
    expected = tiny.post(
        "/v1/completions", {"model": "layers", "prompt": ["é then", "x"], "temperature": 0, "max_tokens": 6}
    )

    result = model.generate(["é then", "x"])

    assert [generation[0].text for generation in result.generations] == [c["text"] for c in expected["choices"]]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    assert "".join(model.stream("x")) == expected["choices"][1]["text"]
