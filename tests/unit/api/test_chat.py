"""What `POST /v1/chat/completions` answers, compared with what the echo engine is known to say."""

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.chat_schemas import ChatCompletionChunk, ChatCompletionResponse
from server.errors import IsolationError
from server.runtime.chat_template import ChatTemplate
from tests.fakes import BOS_ID, EOS_ID, EchoServerParts, expected_logprob
from tests.unit.api.live_server import LiveServer, running_server

# What the fake's template makes of one message of the user's.
ASKED = "<user>France<assistant>"
GOOD: dict[str, Any] = {
    "model": "capital",
    "messages": [{"role": "user", "content": "France"}],
    "temperature": 0,
    "max_tokens": 64,
}


def chat(server: LiveServer, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body)


def stream(server: LiveServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = chat(server, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]


def said(server: LiveServer) -> str:
    """The text that the engine was given last."""
    return bytes(i for i in server.engine.submitted[-1].token_ids if i < BOS_ID).decode()


def test_answer_is_a_message_of_the_assistant(server: LiveServer) -> None:
    response = chat(server, GOOD)

    body = response.json()
    assert response.status_code == 200
    assert ChatCompletionResponse.model_validate(body, strict=True)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": f"[capital@2]{ASKED}", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["prompt"]["version"] == 2
    assert response.headers["x-prompt-digest"] == body["prompt"]["digest"]
    assert body["system_fingerprint"] == "f" * 64
    assert body["usage"] == {
        "prompt_tokens": len(ASKED),
        "completion_tokens": len(f"[capital@2]{ASKED}") + 1,
        "total_tokens": 2 * len(ASKED) + 12,
        "virtual_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_no_special_tokens_are_put_around_what_the_template_wrote(server: LiveServer) -> None:
    chat(server, GOOD)
    plain = server.engine.submitted[-1].token_ids
    chat(server, GOOD | {"add_special_tokens": True})

    assert plain == tuple(ASKED.encode())
    assert server.engine.submitted[-1].token_ids == (BOS_ID, *ASKED.encode())


def test_messages_go_through_the_template_in_order(server: LiveServer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "function_call": None},
        {"role": "user", "content": "é"},
    ]
    chat(server, GOOD | {"messages": messages})
    assert said(server) == "<system>Be brief.<user>a\nb<assistant><user>é<assistant>"

    chat(server, GOOD | {"messages": messages, "add_generation_prompt": False})
    assert said(server) == "<system>Be brief.<user>a\nb<assistant><user>é"


def test_answer_may_fill_what_the_prompt_leaves(data_dir: Path) -> None:
    with running_server(data_dir, parts=EchoServerParts(max_model_len=100), max_request_tokens=120) as live:
        assert live.upload("capital").status_code == 201
        body = {key: value for key, value in GOOD.items() if key != "max_tokens"}
        endless = chat(live, body | {"ignore_eos": True}).json()
        bounded = chat(live, body | {"ignore_eos": True, "n": 2, "model": "tiny/echo"}).json()
        too_long = chat(live, body | {"messages": [{"role": "user", "content": "x" * 80}]})
        too_eager = chat(live, body | {"min_tokens": 90})

    # Four virtual tokens take their place.
    assert endless["usage"]["completion_tokens"] == 100 - len(ASKED) - 4
    assert endless["choices"][0]["finish_reason"] == "length"
    assert bounded["usage"]["completion_tokens"] == 2 * 60
    for refused, param in ((too_long, "messages"), (too_eager, "max_tokens")):
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["param"] == param


def test_an_answer_without_a_bound_fits_a_small_quota_and_is_charged_for_what_it_was(data_dir: Path) -> None:
    """The room that the backbone has is not held against the tenant: no quota below it could ever be met."""
    endless = {key: value for key, value in GOOD.items() if key != "max_tokens"} | {"ignore_eos": True}
    with running_server(
        data_dir, parts=EchoServerParts(max_model_len=390), default_tokens_per_minute=380, max_request_tokens=1000
    ) as live:
        bounded = chat(live, endless | {"model": "tiny/echo", "max_tokens": 390 - len(ASKED)})
        unbounded = chat(live, endless | {"model": "tiny/echo"})
        live.wait_until_idle()
        later = chat(live, endless | {"model": "tiny/echo", "max_tokens": 64})

    assert [answer.status_code for answer in (bounded, unbounded, later)] == [429, 200, 429]
    assert unbounded.json()["usage"]["total_tokens"] == 390


def test_max_completion_tokens_is_max_tokens(server: LiveServer) -> None:
    body = {key: value for key, value in GOOD.items() if key != "max_tokens"}

    answer = chat(server, body | {"max_completion_tokens": 3}).json()

    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_samples_are_choices(server: LiveServer) -> None:
    body = chat(server, GOOD | {"n": 3, "temperature": 1, "seed": 5}).json()

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3


def test_logprobs_have_one_entry_a_token_with_bytes(server: LiveServer) -> None:
    body = chat(
        server, GOOD | {"messages": [{"role": "user", "content": "é"}], "logprobs": True, "top_logprobs": 2}
    ).json()

    choice = body["choices"][0]
    assert ChatCompletionResponse.model_validate(body, strict=True)
    content = choice["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    # The bytes of a character that several tokens share are those of each token.
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == choice["message"]["content"]
    assert content[-1]["token"] == "<eos>"
    assert content[-1]["logprob"] == expected_logprob(EOS_ID)
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]


def test_logprobs_without_alternatives(server: LiveServer) -> None:
    content = chat(server, GOOD | {"logprobs": True, "max_tokens": 1}).json()["choices"][0]["logprobs"]["content"]

    assert content == [{"token": "[", "logprob": expected_logprob(ord("[")), "bytes": [ord("[")], "top_logprobs": []}]


def test_stream_begins_with_the_role_and_ends_with_the_reason(server: LiveServer) -> None:
    chunks = stream(server, GOOD)

    assert all(ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
    ]
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_chunks_add_up_to_the_answer_without_streaming(server: LiveServer) -> None:
    body = GOOD | {
        "messages": [{"role": "user", "content": "één 日本"}], "n": 2, "logprobs": True, "top_logprobs": 3,
        "stop": ["<assis"],
    }  # fmt: skip
    whole = chat(server, body).json()

    chunks = stream(server, body | {"stream_options": {"include_usage": True}})

    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert choice["message"]["content"].endswith("日本")
        content = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == ("stop", "<assis")
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


def test_a_slow_stream_names_the_role_once_and_tells_every_token(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        # A chunk a step, so that half a character's log-probability comes without any text.
        live.engine.step_s = 0.02
        body = {"model": "tiny/echo", "messages": [{"role": "user", "content": "é"}], "temperature": 0}
        chunks = stream(live, body | {"logprobs": True, "n": 2})

    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert len(mine) > 5
        assert ["role" in c["delta"] for c in mine] == [True] + [False] * (len(mine) - 1)
        told = [entry["bytes"] for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert bytes(byte for entry in told[:-1] for byte in entry).decode() == "[bare]<user>é<assistant>"
        assert any(c["logprobs"] and not c["delta"] for c in mine[:-1])


def test_error_in_mid_stream_is_an_error_event(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.step_s = 0.01
        live.engine.errors = {"poison": IsolationError("the row was ended")}
        live.engine.error_after = 3
        body = {"model": "tiny/echo", "messages": [{"role": "user", "content": "poison"}], "stream": True}
        response = chat(live, body)

    assert response.status_code == 200
    assert "event: error\n: the row was ended\n" in response.text
    assert response.text.endswith("data: [DONE]\n\n")


def test_long_conversations_are_handled_off_the_loop(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    render = ChatTemplate.render

    def watched(self: ChatTemplate, *args: Any, **kwargs: Any) -> str:
        names.append(threading.current_thread().name)
        return render(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", watched)
    with running_server(data_dir, parts=EchoServerParts(max_model_len=8192)) as live:
        for content in ("x" * 10, "x" * 5000):
            body = {"model": "tiny/echo", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            assert chat(live, body).status_code == 200

    assert names[0] == "live-server"
    assert names[1].startswith("promptmux-tokenizer")


def test_priority_reaches_the_engine(server: LiveServer) -> None:
    chat(server, GOOD | {"priority": -7})
    assert server.engine.submitted[-1].priority == -7
    server.post({"model": "capital", "prompt": "x", "priority": 100})
    assert server.engine.submitted[-1].priority == 100
    server.post({"model": "capital", "prompt": "x"})
    assert server.engine.submitted[-1].priority == 0


HARMLESS: list[dict[str, Any]] = [
    {"user": "u"}, {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}, {"safety_identifier": "s"},
    {"prompt_cache_key": "k"}, {"parallel_tool_calls": True}, {"tools": []}, {"tool_choice": "auto"},
    {"tool_choice": "none"}, {"functions": []}, {"function_call": "none"}, {"modalities": ["text"]},
    {"response_format": {"type": "text"}}, {"audio": None}, {"top_logprobs": None}, {"logprobs": False},
    {"logit_bias": {}}, {"stop": []}, {"stream": False}, {"include_stop_str_in_output": False},
]  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: next(iter(change)))
def test_harmless_fields_are_taken(server: LiveServer, change: dict[str, Any]) -> None:
    assert chat(server, GOOD | change).status_code == 200


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 257}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "more": 1}]}, "messages.0.more"),
    ({"messages": [{"role": "user", "content": "x", "name": "n" * 65}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"n": 9}, "n"),
    ({"priority": 101}, "priority"),
    ({"priority": -101}, "priority"),
    ({"priority": "1"}, "priority"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"tasks": ["capital"]}, "tasks"),
    ({"user": "u" * 513}, "user"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_field_is_named_and_nothing_runs(server: LiveServer, change: dict[str, Any], param: str) -> None:
    before = len(server.engine.submitted)

    response = chat(server, GOOD | change)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert len(server.engine.submitted) == before


def test_a_templates_own_words_reach_the_client(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]

    error = chat(server, GOOD | {"messages": messages}).json()["error"]

    assert "Roles must alternate." in error["message"]


def test_half_a_surrogate_pair_is_refused(server: LiveServer) -> None:
    with server.client() as client:
        response = client.post(
            "/v1/chat/completions",
            content=b'{"model":"capital","messages":[{"role":"user","content":[{"type":"text","text":"\\ud800"}]}]}',
            headers={"content-type": "application/json"},
        )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content.0"


def test_unknown_task_is_404(server: LiveServer) -> None:
    response = chat(server, GOOD | {"model": "nobody"})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_backbone_without_a_template_says_so(data_dir: Path, path: str) -> None:
    parts = EchoServerParts()
    parts.backbone.tokenizer.chat_template = None
    with running_server(data_dir, parts=parts) as live, live.client() as client:
        response = client.post(path, json={"model": "tiny/echo", "messages": [{"role": "user", "content": "x"}]})
        info = client.get("/tokenizer_info").json()

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "no chat template" in response.json()["error"]["message"]
    assert info["chat_template"] is None
