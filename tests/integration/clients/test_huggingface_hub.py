"""Hugging Face's inference client against a server that speaks OpenAI's API, unchanged."""

import pytest
from huggingface_hub import InferenceClient, constants

from tests.integration.clients.tiny_server import TinyServer

MESSAGES = [{"role": "user", "content": "é?"}]


def test_chat_whole_and_streamed(tiny: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # All tests are kept off the hub, and with it this client off every server.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    expected = tiny.post(
        "/v1/chat/completions", {"model": "layers", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    )

    with InferenceClient(base_url=f"{tiny.url}/v1", api_key="unused") as client:
        whole = client.chat_completion(
            MESSAGES, model="layers", max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
        )
        pieces = list(client.chat_completion(MESSAGES, model="layers", max_tokens=8, temperature=0, stream=True))

    text = expected["choices"][0]["message"]["content"]
    assert whole.choices[0].message.content == text
    assert whole.choices[0].logprobs is not None
    assert whole.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == expected["choices"][0]["finish_reason"]
