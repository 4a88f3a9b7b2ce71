"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in the shapes that vLLM's clients read."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.tokenize import MAX_TOKENIZE_CHARS, DetokenizeResponse, TokenizeResponse
from server.runtime.tokens import TokenCodec
from tests.byte_tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server


def post(server: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


def test_text_becomes_ids(server: LiveServer) -> None:
    body = post(server, "/tokenize", {"model": "capital", "prompt": "hé"}).json()

    assert TokenizeResponse.model_validate(body, strict=True)
    assert body == {"count": 4, "max_model_len": 4096, "tokens": [BOS_ID, *"hé".encode()], "token_strs": None}


def test_empty_text_has_no_tokens_but_special_ones(server: LiveServer) -> None:
    assert post(server, "/tokenize", {"prompt": ""}).json()["tokens"] == [BOS_ID]
    assert post(server, "/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_special_tokens_may_be_left_out_and_names_asked_for(server: LiveServer) -> None:
    body = post(server, "/tokenize", {"prompt": "hé", "add_special_tokens": False, "return_token_strs": True}).json()

    assert body["tokens"] == list("hé".encode())
    assert body["token_strs"] == ["<0x68>", "<0xC3>", "<0xA9>"]


def test_messages_become_ids_through_the_template(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]

    whole = post(server, "/tokenize", {"messages": messages}).json()["tokens"]
    bare = post(
        server, "/tokenize", {"messages": messages, "add_generation_prompt": False, "add_special_tokens": True}
    ).json()["tokens"]
    with server.client() as client:
        client.post("/v1/chat/completions", json={"model": "capital", "messages": messages, "max_tokens": 1})

    assert bytes(whole).decode() == "<user>hi<assistant>"
    assert bare == [BOS_ID, *b"<user>hi"]
    assert server.engine.submitted[-1].token_ids == tuple(whole)


@pytest.mark.parametrize("text", ["plain", "één 日本 🎉", "\N{LINE SEPARATOR}"])
def test_ids_become_the_text_again(server: LiveServer, text: str) -> None:
    tokens = post(server, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]

    body = post(server, "/detokenize", {"tokens": tokens, "model": "capital@1"}).json()

    assert DetokenizeResponse.model_validate(body, strict=True)
    assert body == {"prompt": text}


def test_special_tokens_are_written_by_name(server: LiveServer) -> None:
    assert post(server, "/detokenize", {"tokens": [BOS_ID, 104, EOS_ID]}).json() == {"prompt": "<bos>h<eos>"}
    assert post(server, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_info_has_what_a_harness_reads(server: LiveServer) -> None:
    with server.client() as client:
        info = client.get("/tokenizer_info").json()

    assert info == {
        "tokenizer_class": "ByteTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": None,
        "unk_token": None, "chat_template": CHAT_TEMPLATE, "vocab_size": VOCAB_SIZE, "model_max_length": 4096,
    }  # fmt: skip


def test_long_texts_are_handled_off_the_loop(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    encode, decode = TokenCodec.encode, TokenCodec.decode

    def watched_encode(self: TokenCodec, *args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return encode(self, *args, **kwargs)

    def watched_decode(self: TokenCodec, *args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(TokenCodec, "encode", watched_encode)
    monkeypatch.setattr(TokenCodec, "decode", watched_decode)
    assert post(server, "/tokenize", {"prompt": "x" * 100_000}).json()["count"] == 100_001
    assert len(post(server, "/detokenize", {"tokens": [120] * 100_000}).json()["prompt"]) == 100_000
    assert post(server, "/tokenize", {"messages": [{"role": "user", "content": "x" * 10_000}]}).status_code == 200

    assert len(names) == 3
    assert all(name.startswith("promptmux-tokenizer") for name in names)


def test_text_of_the_largest_size_is_tokenised_and_a_longer_context_takes_more(
    server: LiveServer, tmp_path: Path
) -> None:
    assert post(server, "/tokenize", {"prompt": "x" * MAX_TOKENIZE_CHARS}).json()["count"] == MAX_TOKENIZE_CHARS + 1
    with running_server(tmp_path / "data", parts=EchoServerParts(max_model_len=40_000)) as roomy:
        assert post(roomy, "/tokenize", {"prompt": "x" * 320_000}).status_code == 200
        assert post(roomy, "/tokenize", {"prompt": "x" * 320_001}).json()["error"]["param"] == "prompt"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {"prompt": "x" * (MAX_TOKENIZE_CHARS + 1)}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "x" * MAX_TOKENIZE_CHARS}]}, "messages"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/tokenize", {"prompt": ["x"]}, "prompt"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ("/tokenize", {"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    ("/tokenize", {"prompt": "x", "chat_template": "x"}, "chat_template"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [1, -1]}, "tokens.1"),
    ("/detokenize", {"tokens": [1, True]}, "tokens.1"),
    ("/detokenize", {"tokens": [1, 1.0]}, "tokens.1"),
    ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens.0"),
    ("/detokenize", {"tokens": [1] * ((1 << 18) + 1)}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_field_is_named(server: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    response = post(server, path, body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_unknown_model_is_404(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    response = post(server, path, body | {"model": "nobody"})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
