"""`inspect` over HTTP: what it says of a version, and what it refuses. The figures are tested without HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from server.api.inspect_schemas import InspectionObject
from tests.fakes import HIDDEN_SIZE, ByteTokenizer, EchoVocabulary, make_prompt_config
from tests.unit.api.live_server import LiveServer, running_server

TOKENS = [65, 66, 67]


def upload(live: LiveServer, task: str, values: np.ndarray, **config: Any) -> dict[str, Any]:
    files = {
        "file": ("adapter_model.safetensors", save({"prompt_embeddings": values.astype(np.float32)})),
        "config": ("adapter_config.json", make_prompt_config(num_virtual_tokens=len(values), **config)),
    }
    with live.client() as client:
        response = client.post(f"/v1/tasks/{task}/versions", files=files)
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Task `letters`: version 1 is made of tokens' embeddings, 2 of other numbers, 3 of one vector less, 4 a prefix."""
    with running_server(tmp_path_factory.mktemp("data")) as live:
        upload(live, "letters", 2 * EchoVocabulary().embeddings[TOKENS])
        upload(live, "letters", np.random.default_rng(1).standard_normal((3, HIDDEN_SIZE)))
        upload(live, "letters", np.random.default_rng(2).standard_normal((2, HIDDEN_SIZE)))
        prefix = {"peft_type": "PREFIX_TUNING", "token_dim": 4, "num_layers": 2, "num_attention_heads": 1}
        upload(live, "letters", np.random.default_rng(3).standard_normal((3, 2 * 2 * 4)), **prefix)
        yield live


def inspect(live: LiveServer, path: str, **query: Any) -> httpx.Response:
    with live.client() as client:
        return client.get(f"/v1/tasks/{path}/inspect", params=query)


def test_each_virtual_token_has_its_nearest_tokens(server: LiveServer) -> None:
    body = inspect(server, "letters/versions/1", top=2).json()

    assert InspectionObject.model_validate_json(json.dumps(body), strict=True)
    assert (body["object"], body["task"], body["version"]) == ("prompt_inspection", "letters", 1)
    assert body["kind"] == "embeddings"
    assert [vector["nearest"][0]["token_id"] for vector in body["vectors"]] == TOKENS
    assert [vector["nearest"][0]["text"] for vector in body["vectors"]] == [ByteTokenizer().decode([t]) for t in TOKENS]
    assert [vector["nearest"][0]["cosine"] for vector in body["vectors"]] == pytest.approx([1.0] * 3, abs=1e-6)
    assert [len(vector["nearest"]) for vector in body["vectors"]] == [2, 2, 2]
    assert body["vocabulary"]["size"] == len(EchoVocabulary().embeddings)
    assert body["norms"]["max"] >= body["norms"]["p50"] >= body["norms"]["min"] > 0
    assert body["layers"] == []
    assert body["against"] is None


def test_five_tokens_are_told_unless_asked_otherwise(server: LiveServer) -> None:
    assert len(inspect(server, "letters/versions/1").json()["vectors"][0]["nearest"]) == 5


@pytest.mark.parametrize("by_digest", [False, True])
def test_another_version_is_named_by_number_or_digest(server: LiveServer, by_digest: bool) -> None:
    with server.client() as client:
        digest = client.get("/v1/tasks/letters/versions/3").json()["digest"]

    body = inspect(server, "letters/versions/2", against=f"sha256:{digest}" if by_digest else "3").json()

    assert (body["against"]["version"], body["against"]["digest"]) == (3, digest)
    assert (body["num_virtual_tokens"], body["against"]["num_virtual_tokens"]) == (3, 2)
    assert body["against"]["num_compared"] == 2
    assert len(body["against"]["vectors"]) == 2
    assert body["against"]["overall"]["worst_cosine"] == min(v["cosine"] for v in body["against"]["vectors"])


def test_a_prefix_is_told_by_layers(server: LiveServer) -> None:
    body = inspect(server, "letters/versions/4", against="4").json()

    assert body["kind"] == "prefix"
    assert body["vectors"] == []
    assert body["norms"] is None
    assert [layer["layer"] for layer in body["layers"]] == [0, 1]
    assert body["against"]["overall"] is None
    assert [layer["keys"]["worst_cosine"] for layer in body["against"]["layers"]] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("path", "query", "status", "param", "code"),
    [
        ("letters/versions/1", {"top": 0}, 400, "top", "invalid_request"),
        ("letters/versions/1", {"top": 51}, 400, "top", "invalid_request"),
        ("letters/versions/1", {"against": "latest"}, 400, "against", "invalid_request"),
        ("letters/versions/1", {"against": "0"}, 400, "against", "invalid_request"),
        ("letters/versions/1", {"other": "1"}, 400, "other", "invalid_request"),
        ("letters/versions/1", {"against": "4"}, 400, "against", "invalid_request"),
        ("letters/versions/0", {}, 400, "version", "invalid_request"),
        ("letters/versions/9", {}, 404, "model", "model_not_found"),
        ("nobody/versions/1", {}, 404, "model", "model_not_found"),
        ("letters/versions/1", {"against": "9"}, 404, "against", "model_not_found"),
        ("letters/versions/1", {"against": f"sha256:{'0' * 64}"}, 404, "against", "model_not_found"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    server: LiveServer, path: str, query: dict[str, Any], status: int, param: str, code: str
) -> None:
    response = inspect(server, path, **query)

    assert response.status_code == status, response.text
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)
