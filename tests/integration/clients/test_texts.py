"""Texts over HTTP: the same streamed and whole, cut where a stop string begins, and as the tokenizer decodes them."""

import asyncio
from typing import Any

import httpx
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.integration.clients.tiny_server import EOS_ID, TinyServer

SEEDS = range(12)
# Random bytes: characters are cut in two, and many never become whole.
WILD: dict[str, Any] = {"prompt": "then é", "max_tokens": 40, "temperature": 1.0, "ignore_eos": True}


def wild(tiny: TinyServer, seed: int, **fields: Any) -> dict[str, Any]:
    return {"model": "front", **WILD, "seed": seed, **fields}


def text_of(tiny: TinyServer, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text and the last choice; streamed and whole must be the same."""
    [whole] = tiny.post("/v1/completions", body)["choices"]
    pieces = [chunk["choices"][0] for chunk in tiny.stream("/v1/completions", body)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [whole["finish_reason"]]
    assert pieces[-1]["stop_reason"] == whole["stop_reason"]
    return whole["text"], whole


def generated_ids(tiny: TinyServer, body: dict[str, Any]) -> list[int]:
    """The tokens of an answer, told apart by their bytes."""
    by_bytes = {tuple(_bytes(name)): token_id for name, token_id in tiny.tokenizer.get_vocab().items()}
    chat = {key: value for key, value in body.items() if key != "prompt"}
    chat |= {"messages": [{"role": "user", "content": body["prompt"]}], "logprobs": True}
    [choice] = tiny.post("/v1/chat/completions", chat)["choices"]
    return [by_bytes[tuple(entry["bytes"])] for entry in choice["logprobs"]["content"]]


def _bytes(name: str) -> bytes:
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    return name.encode() if name.startswith("<") and len(name) > 1 else bytes(alphabet[c] for c in name)


@pytest.mark.parametrize("seed", SEEDS)
def test_streamed_text_is_the_whole_one_however_characters_are_cut(tiny: TinyServer, seed: int) -> None:
    text_of(tiny, wild(tiny, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_text_ends_where_a_stop_string_begins(tiny: TinyServer, seed: int) -> None:
    full, _ = text_of(tiny, wild(tiny, seed))
    # Cuts tokens and characters wherever it falls; one that never comes must hold nothing back for ever.
    for start, length in ((3, 1), (7, 3), (len(full) // 2, 5)):
        stop = full[start : start + length]
        text, choice = text_of(tiny, wild(tiny, seed, stop=["never said", stop]))
        assert text == full[: full.find(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    text, choice = text_of(tiny, wild(tiny, seed, stop=[full[-3:] + "!!"]))
    assert (text, choice["finish_reason"]) == (full, "length")


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_of_the_tokens_are_those_of_the_answer(tiny: TinyServer, seed: int) -> None:
    body = {
        "model": "layers", "messages": [{"role": "user", "content": "é"}], "seed": seed, "max_tokens": 40,
        "logprobs": True, "top_logprobs": 1, "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    [choice] = tiny.post("/v1/chat/completions", body)["choices"]

    content = choice["logprobs"]["content"]
    assert len(content) == 40
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]


@pytest.mark.parametrize("seed", SEEDS)
def test_text_is_what_the_tokenizer_decodes(tiny: TinyServer, seed: int) -> None:
    body = wild(tiny, seed)
    ids = generated_ids(tiny, body)
    chat = {key: value for key, value in body.items() if key != "prompt"}
    chat |= {"messages": [{"role": "user", "content": body["prompt"]}]}

    [choice] = tiny.post("/v1/chat/completions", chat)["choices"]

    assert choice["message"]["content"] == tiny.tokenizer.decode(ids, skip_special_tokens=True)


def test_end_of_sequence_ends_the_text_without_a_trace(tiny: TinyServer) -> None:
    text, choice = text_of(
        tiny, {"model": "front", "prompt": "x", "max_tokens": 5, "logit_bias": {str(EOS_ID): 100}, "temperature": 0}
    )

    assert (text, choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)


def test_stop_token_ids_end_the_text_and_are_the_reason(tiny: TinyServer) -> None:
    token_id = tiny.tokenizer("!")["input_ids"][0]
    text, choice = text_of(
        tiny,
        {
            "model": "front", "prompt": "x", "max_tokens": 5, "logit_bias": {str(token_id): 100}, "temperature": 0,
            "stop_token_ids": [token_id],
        },
    )  # fmt: skip

    assert (text, choice["finish_reason"], choice["stop_reason"]) == ("", "stop", token_id)


def test_a_seed_gives_the_same_text_whatever_shares_the_batch(tiny: TinyServer) -> None:
    alone = tiny.post("/v1/completions", wild(tiny, 77, n=2))["choices"]

    async def crowd() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            bodies = [wild(tiny, 77, n=2), *(wild(tiny, seed, prompt="y" * seed) for seed in range(1, 9))]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            choices: list[dict[str, Any]] = answers[0].json()["choices"]
            return choices

    together = asyncio.run(crowd())

    assert [choice["text"] for choice in together] == [choice["text"] for choice in alone]
    assert alone[0]["text"] != alone[1]["text"]


def test_a_chat_is_the_completion_of_its_rendered_text(tiny: TinyServer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é?"}]
    ids = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    fields = {"model": "front", "max_tokens": 12, "temperature": 0, "ignore_eos": True}

    chat = tiny.post("/v1/chat/completions", fields | {"messages": messages})
    plain = tiny.post("/v1/completions", fields | {"prompt": ids})
    tokens = tiny.post("/tokenize", {"messages": messages})["tokens"]

    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"]["prompt_tokens"] == len(ids)
    assert tokens == ids
    assert tiny.post("/detokenize", {"tokens": ids})["prompt"] == tiny.tokenizer.decode(ids)
