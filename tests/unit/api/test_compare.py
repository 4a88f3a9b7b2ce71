"""`compare` over the echo engine, which answers `[task@version]text`: what is asked, and what comes of the answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompt_store.store import PromptStore
from server.api.compare_schemas import ComparisonObject
from server.errors import NumericalError
from server.runtime.answers import MAX_SLICE_ROWS, PRIORITY
from server.runtime.comparison import MAX_DIFFERENCES, MAX_SHOWN_CHARS
from tests.fakes import BOS_ID, make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

ONE_INPUT = {"versions": [1, 2], "inputs": [{"prompt": "x"}]}


def upload(live: LiveServer, value: float, *probes: tuple[str, str]) -> None:
    files: dict[str, Any] = {
        "file": ("adapter_model.safetensors", make_prompt_file(value)),
        "config": ("adapter_config.json", make_prompt_config()),
    }
    if probes:
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in probes]
        files["probes"] = ("probes.jsonl", "\n".join(lines).encode())
    with live.client() as client:
        assert client.post("/v1/tasks/capital/versions", files=files).status_code == 201


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Of `capital`, versions 1 and 3 have probes."""
    with running_server(tmp_path_factory.mktemp("data")) as live:
        upload(live, 0.1, ("one", "[capital@1]one"), ("two", "no"))
        upload(live, 0.2)
        upload(live, 0.3, ("three", "[capital@3]three"))
        yield live


def compare(live: LiveServer, body: Any, task: str = "capital") -> httpx.Response:
    with live.client() as client:
        # ASCII, so that half a surrogate pair can be sent.
        return client.post(
            f"/v1/tasks/{task}/compare", content=json.dumps(body), headers={"content-type": "application/json"}
        )


def test_answers_of_both_are_compared_with_each_other_and_with_what_is_expected(server: LiveServer) -> None:
    inputs = [
        {"prompt": "a", "completion": " [capital@1]a\n"},
        {"prompt": "b", "completion": "[capital@1]b"},
        {"prompt": "c", "completion": "[capital@2]c"},
        {"prompt": "d"},
    ]
    body = compare(server, {"versions": [1, 2], "inputs": inputs}).json()

    assert ComparisonObject.model_validate_json(json.dumps(body), strict=True)
    assert [version["version"] for version in body["versions"]] == [1, 2]
    with server.client() as client:
        digests = [client.get(f"/v1/tasks/capital/versions/{v}").json()["digest"] for v in (1, 2)]
    assert [version["digest"] for version in body["versions"]] == digests
    assert (body["num_inputs"], body["inputs_of"]) == (4, None)
    assert body["agreement"] == 0.0
    assert body["exact_match"] == pytest.approx([2 / 3, 1 / 3])
    assert body["num_different"] == 4
    assert [different["index"] for different in body["differences"]] == [0, 1, 2, 3]
    assert body["differences"][1]["answers"] == ["[capital@1]b", "[capital@2]b"]
    assert body["differences"][3]["completion"] is None
    assert body["differences"][3]["logprobs"] is None
    # The echo finds every byte as likely whoever says it.
    assert body["logprob"]["num_scored"] == 3
    assert body["logprob"]["mean_change"] == 0.0


def test_a_version_agrees_with_itself(server: LiveServer) -> None:
    body = compare(server, {"versions": [2, 2], "inputs": [{"prompt": "a"}, {"prompt": "b"}]}).json()

    assert (body["agreement"], body["num_different"], body["differences"]) == (1.0, 0, [])
    assert body["exact_match"] is None
    assert body["logprob"] is None


def test_null_stands_for_the_bare_backbone(server: LiveServer) -> None:
    body = compare(server, {"versions": [None, 1], "inputs": [{"prompt": "a"}]}).json()

    assert body["versions"][0] is None
    assert body["differences"][0]["answers"] == ["[bare]a", "[capital@1]a"]


@pytest.mark.parametrize(
    ("versions", "inputs_of", "prompts"),
    [([1, 2], 1, ["one", "two"]), ([1, 3], 3, ["three"]), ([3, None], 3, ["three"])],
)
def test_inputs_default_to_the_probes_of_the_second_version_else_of_the_first(
    server: LiveServer, versions: list[int | None], inputs_of: int, prompts: list[str]
) -> None:
    body = compare(server, {"versions": versions}).json()

    assert body["inputs_of"] == inputs_of
    assert [different["prompt"] for different in body["differences"]] == prompts
    assert body["exact_match"] is not None


def test_both_share_their_batches_behind_everybody_else(server: LiveServer) -> None:
    before = len(server.engine.submitted)
    inputs = [{"prompt": f"q{i}", "completion": "x"} for i in range(MAX_SLICE_ROWS)]

    compare(server, {"versions": [1, 2], "inputs": inputs, "max_tokens": 5})

    rows = server.engine.submitted[before:]
    asked, scored = ([row for row in rows if row.sampling.max_tokens == wanted] for wanted in (5, 0))
    assert len(asked) == len(scored) == 2 * MAX_SLICE_ROWS
    assert {row.priority for row in rows} == {PRIORITY}
    assert {row.sampling.temperature for row in rows} == {0.0}
    first_slice = asked[:MAX_SLICE_ROWS]
    assert [row.prompt.version for row in first_slice if row.prompt] == [1] * (MAX_SLICE_ROWS // 2) + [2] * (
        MAX_SLICE_ROWS // 2
    )
    assert scored[0].token_ids == (BOS_ID, *b"q0", *b"x")
    assert scored[0].sampling.prompt_logprobs == 0


def test_what_is_shown_of_differences_is_bounded(server: LiveServer) -> None:
    inputs = [{"prompt": "y" * 1000} for _ in range(MAX_DIFFERENCES + 1)]

    body = compare(server, {"versions": [1, 2], "inputs": inputs, "max_tokens": 20}).json()

    assert body["num_different"] == MAX_DIFFERENCES + 1
    assert len(body["differences"]) == MAX_DIFFERENCES
    assert len(body["differences"][0]["prompt"]) == MAX_SHOWN_CHARS


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "versions"),
        ({"versions": [1]}, 400, "versions"),
        ({"versions": [1, 2, 3]}, 400, "versions"),
        ({"versions": [1, 0]}, 400, "versions.1"),
        ({"versions": [1, "2"]}, 400, "versions.1"),
        ({"versions": [1, 2], "inputs": []}, 400, "inputs"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x"}] * 257}, 400, "inputs"),
        ({"versions": [1, 2], "inputs": [{"prompt": ""}]}, 400, "inputs.0.prompt"),
        ({"versions": [1, 2], "inputs": [{"prompt": "\ud800"}]}, 400, "inputs.0.prompt"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x", "completion": ""}]}, 400, "inputs.0.completion"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x", "other": 1}]}, 400, "inputs.0.other"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x" * 5000}]}, 400, "inputs"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x"}], "max_tokens": 129}, 400, "max_tokens"),
        ({"versions": [1, 2], "inputs": [{"prompt": "x"}], "max_tokens": 0}, 400, "max_tokens"),
        ({"versions": [None, 2]}, 400, "inputs"),
        ({"versions": [1, 9], "inputs": [{"prompt": "x"}]}, 404, "versions.1"),
    ],
)
def test_unsound_comparisons_are_refused(server: LiveServer, body: Any, status: int, param: str) -> None:
    response = compare(server, body)

    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("versions", [[1, 2], [None, None]])
def test_tasks_that_are_nobodys_are_unknown(server: LiveServer, versions: list[int | None]) -> None:
    response = compare(server, {"versions": versions, "inputs": [{"prompt": "x"}]}, task="nobody")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_an_error_of_one_row_ends_all_of_them(server: LiveServer) -> None:
    server.engine.errors["broken"] = NumericalError("logits are not finite")
    try:
        response = compare(server, {"versions": [1, 2], "inputs": [{"prompt": "sound"}, {"prompt": "broken"}]})
    finally:
        server.engine.errors.clear()

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "non_finite_logits"
    server.wait_until_idle()


def test_a_client_that_leaves_takes_its_rows_with_it(server: LiveServer) -> None:
    before = server.metric("client_disconnects_total")
    server.engine.gate.clear()
    try:
        with server.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/tasks/capital/compare", json=ONE_INPUT, timeout=0.2)
        server.wait_until(lambda: server.metric("client_disconnects_total") == before + 1)
    finally:
        server.engine.gate.set()
    server.wait_until_idle()


def test_receipts_say_which_prompts_answered(server: LiveServer) -> None:
    with server.client() as client:
        client.post(
            "/v1/tasks/capital/compare",
            json=ONE_INPUT,
            headers={"x-request-id": "a-comparison"},
        )

        def answered() -> set[int]:
            page = client.get("/v1/audit", params={"kind": "receipts", "request_id": "a-comparison"}).text
            return {json.loads(line)["version"] for line in page.splitlines()}

        server.wait_until(lambda: answered() == {1, 2})


def test_probes_are_used_by_those_alone_who_may_write(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data") as store:
        infer, write = (store.create_key("default", scopes)[1] for scopes in (["infer"], ["infer", "write"]))
    with running_server(tmp_path / "data") as live, live.client() as client:
        files = {
            "file": ("adapter_model.safetensors", make_prompt_file(0.1)),
            "config": ("adapter_config.json", make_prompt_config()),
            "probes": ("probes.jsonl", b'{"prompt": "secret", "completion": "x"}'),
        }
        keys = {"infer": {"authorization": f"Bearer {infer}"}, "write": {"authorization": f"Bearer {write}"}}
        assert client.post("/v1/tasks/own/versions", files=files, headers=keys["write"]).status_code == 201
        url, by_probes = "/v1/tasks/own/compare", {"versions": [1, None]}

        refused = client.post(url, json=by_probes, headers=keys["infer"])

        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert "secret" not in refused.text
        assert client.post(url, json=by_probes, headers=keys["write"]).status_code == 200
        given = by_probes | {"inputs": [{"prompt": "x"}]}
        assert client.post(url, json=given, headers=keys["infer"]).status_code == 200


def test_probes_of_a_shared_version_are_not_for_every_tenant_that_may_write(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data") as store:
        own, foreign, operator = (
            {"authorization": f"Bearer {store.create_key(tenant, scopes)[1]}"}
            for tenant, scopes in (("shared", ["infer", "write"]), ("acme", ["infer", "write"]), ("ops", ["admin"]))
        )
    with running_server(tmp_path / "data") as live, live.client() as client:
        files = {
            "file": ("adapter_model.safetensors", make_prompt_file(0.1)),
            "config": ("adapter_config.json", make_prompt_config()),
            "probes": ("probes.jsonl", b'{"prompt": "secret", "completion": "x"}'),
        }
        assert client.post("/v1/tasks/all/versions", files=files, headers=own).status_code == 201
        url, by_probes = "/v1/tasks/all/compare", {"versions": [1, None]}

        refused = client.post(url, json=by_probes, headers=foreign)

        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert "secret" not in refused.text
        assert {client.post(url, json=by_probes, headers=key).status_code for key in (own, operator)} == {200}
        given = by_probes | {"inputs": [{"prompt": "x"}]}
        assert client.post(url, json=given, headers=foreign).status_code == 200
