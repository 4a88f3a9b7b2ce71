"""What `POST /v1/completions` answers, compared with what the echo engine is known to say."""

import threading
from pathlib import Path

import pytest

from server.api.completion_schemas import CompletionResponse
from server.runtime.generation import derive_seed
from tests.fakes import BOS_ID, EOS_ID, VOCAB_SIZE, EchoServerParts, expected_logprob
from tests.unit.api.live_server import LiveServer, running_server


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def test_answer_names_prompt_backbone_and_usage(server: LiveServer) -> None:
    response = server.post({"model": "capital", "prompt": "France", "temperature": 0, "max_tokens": 64})

    body = response.json()
    digest = body["prompt"]["digest"]
    assert response.status_code == 200
    assert CompletionResponse.model_validate(body, strict=True)
    assert body["choices"] == [
        {"index": 0, "text": "[capital@2]France", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["prompt"] == {"task": "capital", "version": 2, "digest": digest}
    assert response.headers["x-prompt-digest"] == digest
    assert body["system_fingerprint"] == "f" * 64
    assert body["model"] == "capital"
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 18,
        "total_tokens": 25,
        "virtual_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_backbone_name_means_no_prompt(server: LiveServer) -> None:
    response = server.post({"model": "tiny/echo", "prompt": "x", "temperature": 0})

    assert response.json()["choices"][0]["text"] == "[bare]x"
    assert response.json()["prompt"] is None
    assert response.json()["usage"]["virtual_tokens"] == 0
    assert "x-prompt-digest" not in response.headers


def test_version_and_digest_references_answer_with_that_version(server: LiveServer) -> None:
    current = server.post({"model": "capital", "prompt": "x", "temperature": 0}).json()["prompt"]
    with server.client() as client:
        first = client.get("/v1/tasks/capital/versions/1").json()

    by_version = server.post({"model": "capital@1", "prompt": "x", "temperature": 0}).json()
    by_digest = server.post({"model": f"capital@sha256:{first['digest']}", "prompt": "x", "temperature": 0}).json()

    assert current["version"] == 2
    assert by_version["prompt"] == by_digest["prompt"]
    assert by_version["prompt"] == {"task": "capital", "version": 1, "digest": first["digest"]}
    assert by_version["model"] == "capital@1"


def test_max_tokens_defaults_to_sixteen(server: LiveServer) -> None:
    body = server.post({"model": "capital", "prompt": "a long enough text", "temperature": 0}).json()

    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


def test_index_counts_samples_within_items(server: LiveServer) -> None:
    body = server.post({"model": "capital", "prompt": ["aa", "bb"], "n": 3, "temperature": 0, "max_tokens": 64}).json()

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"][-2:] for choice in body["choices"]] == ["aa", "aa", "aa", "bb", "bb", "bb"]
    # An item's tokens count once, however many samples it has.
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["virtual_tokens"] == 8


def test_token_ids_are_taken_as_they_are(server: LiveServer) -> None:
    one = server.post({"model": "capital", "prompt": ids_of("hey"), "temperature": 0, "max_tokens": 64}).json()
    many = server.post(
        {"model": "capital", "prompt": [ids_of("a"), ids_of("bc")], "temperature": 0, "max_tokens": 64}
    ).json()

    assert one["usage"]["prompt_tokens"] == 3
    assert one["choices"][0]["text"] == "[capital@2]hey"
    assert [choice["text"] for choice in many["choices"]] == ["[capital@2]a", "[capital@2]bc"]


def test_special_tokens_are_added_unless_told_otherwise(server: LiveServer) -> None:
    server.post({"model": "capital", "prompt": "q1"})
    server.post({"model": "capital", "prompt": "q2", "add_special_tokens": False})

    with_bos, without = server.engine.submitted[-2:]
    assert with_bos.token_ids == (BOS_ID, *ids_of("q1"))
    assert without.token_ids == tuple(ids_of("q2"))


def test_tasks_fan_one_prompt_out(server: LiveServer) -> None:
    response = server.post(
        {"tasks": ["capital", "german", "tiny/echo"], "prompt": "x", "temperature": 0, "max_tokens": 64, "n": 2}
    )

    body = response.json()
    assert CompletionResponse.model_validate(body, strict=True)
    assert [choice["text"] for choice in body["choices"]] == [
        "[capital@2]x", "[capital@2]x", "[german@1]x", "[german@1]x", "[bare]x", "[bare]x",
    ]  # fmt: skip
    assert [choice["task"] for choice in body["choices"][::2]] == ["capital", "german", "tiny/echo"]
    assert body["choices"][2]["prompt"]["task"] == "german"
    assert body["choices"][4]["prompt"] is None
    assert body["prompt"] is None
    assert "x-prompt-digest" not in response.headers
    assert body["usage"]["prompt_tokens"] == 6


def test_tasks_pair_with_items(server: LiveServer) -> None:
    body = server.post(
        {"model": "tiny/echo", "tasks": ["capital@1", "german"], "prompt": ["x", "y"], "temperature": 0}
    ).json()

    assert [choice["text"] for choice in body["choices"]] == ["[capital@1]x", "[german@1]y"]
    assert [choice["task"] for choice in body["choices"]] == ["capital@1", "german"]


def test_stop_strings_end_the_text_and_are_not_part_of_it(server: LiveServer) -> None:
    body = server.post(
        {"model": "capital", "prompt": "one, two", "temperature": 0, "max_tokens": 64, "stop": [", ", "zz"]}
    ).json()

    assert body["choices"][0]["text"] == "[capital@2]one"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == ", "


def test_stop_token_id_is_the_stop_reason(server: LiveServer) -> None:
    body = server.post(
        {"model": "capital", "prompt": "a!b", "temperature": 0, "max_tokens": 64, "stop_token_ids": [ord("!")]}
    ).json()

    assert body["choices"][0]["stop_reason"] == ord("!")


def test_seed_gives_each_row_its_own_and_the_same_again(server: LiveServer) -> None:
    body = {"model": "capital", "prompt": ["a", "b"], "n": 2, "seed": 7, "max_tokens": 64}

    server.post(body)
    first = [row.sampling.seed for row in server.engine.submitted[-4:]]
    server.post(body)
    second = [row.sampling.seed for row in server.engine.submitted[-4:]]
    server.post(body | {"seed": None})
    unseeded = [row.sampling.seed for row in server.engine.submitted[-4:]]

    assert first == [derive_seed(7, item, sample) for item in (0, 1) for sample in (0, 1)]
    assert first == second
    assert len(set(first)) == 4
    assert len({*first, *unseeded}) == 8


def test_every_sampling_field_reaches_the_engine(server: LiveServer) -> None:
    server.post(
        {
            "model": "capital", "prompt": "x", "max_completion_tokens": 9, "min_tokens": 2, "temperature": 0.5,
            "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5,
            "repetition_penalty": 1.2, "logit_bias": {"65": 400, "66": -3, "67": -(10**400)}, "stop": "zz",
            "stop_token_ids": [3], "ignore_eos": True, "skip_special_tokens": False, "logprobs": 2, "user": "someone",
            "best_of": 1, "response_format": {"type": "text"}, "stream": False,
        }
    )  # fmt: skip

    sampling = server.engine.submitted[-1].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.5, 1.2)
    assert sampling.logit_bias == {65: 100.0, 66: -3.0, 67: -100.0}
    assert (sampling.stop, sampling.stop_token_ids) == (("zz",), (3,))
    assert (sampling.ignore_eos, sampling.skip_special_tokens) == (True, False)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, None)


def test_null_stands_for_every_default(server: LiveServer) -> None:
    fields = ["max_tokens", "n", "temperature", "top_p", "stop", "logit_bias", "logprobs", "echo", "stream", "seed"]

    response = server.post({"model": "capital", "prompt": "x", **dict.fromkeys(fields)})

    assert response.status_code == 200
    assert server.engine.submitted[-1].sampling.temperature == 1.0


def test_empty_stop_list_is_legal(server: LiveServer) -> None:
    assert server.post({"model": "capital", "prompt": "x", "stop": []}).status_code == 200


def test_echo_puts_the_clients_text_first(server: LiveServer) -> None:
    text = server.post({"model": "capital", "prompt": "Hé", "temperature": 0, "max_tokens": 64, "echo": True}).json()
    ids = server.post(
        {"model": "capital", "prompt": [BOS_ID, *ids_of("Hé")], "temperature": 0, "max_tokens": 64, "echo": True}
    ).json()

    assert text["choices"][0]["text"] == "Hé[capital@2]Hé"
    assert ids["choices"][0]["text"] == "Hé[capital@2]Hé"
    assert text["choices"][0]["logprobs"] is None


def test_max_tokens_zero_with_echo_scores_the_prompt_alone(server: LiveServer) -> None:
    body = server.post(
        {"model": "capital", "prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    ).json()

    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [None, expected_logprob(ord("a")), expected_logprob(ord("b"))]
    assert body["usage"]["completion_tokens"] == 0


def test_logprobs_have_one_entry_a_token_with_eos(server: LiveServer) -> None:
    body = server.post(
        {"model": "tiny/echo", "prompt": "x", "temperature": 0, "max_tokens": 64, "logprobs": 2, "echo": True}
    ).json()

    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    tokens = ["<bos>", "x", *"[bare]x", "<eos>"]
    assert logprobs["tokens"] == tokens
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][-1] == expected_logprob(EOS_ID)
    for token, own, top in list(zip(tokens, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]:
        assert top[token] == own
        assert len(top) == 3
    # Special tokens take no room in a text that skips them.
    assert logprobs["text_offset"] == [0, 0, *range(1, 9)]
    for token, offset in list(zip(tokens, logprobs["text_offset"], strict=True))[1:-1]:
        assert choice["text"][offset:].startswith(token)


def test_logprobs_zero_reports_the_chosen_token_alone(server: LiveServer) -> None:
    logprobs = server.post(
        {"model": "tiny/echo", "prompt": "x", "temperature": 0, "max_tokens": 1, "logprobs": 0}
    ).json()["choices"][0]["logprobs"]

    own = expected_logprob(ord("["))
    assert logprobs == {
        "tokens": ["["], "token_logprobs": [own], "top_logprobs": [{"[": own}], "text_offset": [0],
    }  # fmt: skip


def test_bytes_of_one_character_share_its_offset_and_the_larger_logprob_stays(server: LiveServer) -> None:
    text = "é!"
    choice = server.post(
        {"model": "tiny/echo", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 20, "temperature": 0}
    ).json()["choices"][0]

    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<bos>", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", "!"]
    assert logprobs["text_offset"] == [0, 0, 0, 1]
    # All of the alternatives of a high byte read alike.
    assert logprobs["top_logprobs"][1] == {"\N{REPLACEMENT CHARACTER}": expected_logprob("é".encode()[0])}


@pytest.mark.parametrize("prompt", ["x" * 5000, ["y" * 3000, "z" * 3000]])
def test_long_texts_are_tokenised_off_the_loop(data_dir: Path, prompt: str | list[str]) -> None:
    with running_server(data_dir, parts=EchoServerParts(max_model_len=8192)) as live:
        body = live.post({"model": "tiny/echo", "prompt": prompt, "max_tokens": 1, "temperature": 0}).json()

    assert body["usage"]["prompt_tokens"] == sum(map(len, [prompt] if isinstance(prompt, str) else prompt)) + len(
        body["choices"]
    )


def test_upload_changes_rows_admitted_later_only(server: LiveServer) -> None:
    server.engine.gate.clear()
    answers: list[str] = []
    early = threading.Thread(
        target=lambda: answers.append(
            server.post({"model": "german", "prompt": "x", "temperature": 0}).json()["choices"][0]["text"]
        )
    )
    early.start()
    server.engine.wait_for(lambda engine: engine.num_rows == 1)
    assert server.upload("german", 0.9).json()["version"] == 2
    server.engine.gate.set()
    early.join()
    late = server.post({"model": "german", "prompt": "x", "temperature": 0}).json()["choices"][0]["text"]

    assert (answers, late) == (["[german@1]x"], "[german@2]x")


def test_vocabulary_ends_where_the_backbone_says(server: LiveServer) -> None:
    assert server.post({"model": "capital", "prompt": [VOCAB_SIZE - 1]}).status_code == 200
    assert server.post({"model": "capital", "prompt": [VOCAB_SIZE]}).json()["error"]["param"] == "prompt.0"
