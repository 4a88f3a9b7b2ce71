"""Canaries, gates and provenance over HTTP, from the upload to the answer."""

from pathlib import Path
from typing import Any

import pytest

from prompt_store.manifest import PromptVersion
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

PROBES = b'{"prompt": "x", "completion": "y"}\n'


def request(server: LiveServer, method: str, path: str, **arguments: Any) -> Any:
    with server.client() as client:
        return client.request(method, path, **arguments)


def upload(server: LiveServer, task: str, value: float, *, probes: bytes | None = None, **fields: str) -> Any:
    files = {"file": make_prompt_file(value), "config": make_prompt_config()}
    if probes is not None:
        files["probes"] = probes
    return request(server, "POST", f"/v1/tasks/{task}/versions", files=files, data=fields)


def ask(server: LiveServer, task: str, request_id: str) -> int:
    answer = server.post({"model": task, "prompt": "x"}, headers={"x-request-id": request_id})
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["prompt"]["version"]
    return version


def test_canary_answers_a_share_of_the_requests_and_a_retry_meets_the_same_version(server: LiveServer) -> None:
    upload(server, "birds", 0.1)
    upload(server, "birds", 0.2)
    changed = request(server, "PATCH", "/v1/tasks/birds", json={"canary": {"version": 1, "percent": 50}})
    assert changed.json()["canary"] == {"version": 1, "percent": 50}

    answers = {f"r{index}": ask(server, "birds", f"r{index}") for index in range(24)}

    assert set(answers.values()) == {1, 2}
    assert {request_id: ask(server, "birds", request_id) for request_id in answers} == answers
    kept = request(server, "PATCH", "/v1/tasks/birds", json={"pinned": True})
    assert kept.json()["canary"] == {"version": 1, "percent": 50}
    cleared = request(server, "PATCH", "/v1/tasks/birds", json={"canary": None, "pinned": False})
    assert cleared.json()["canary"] is None
    assert {ask(server, "birds", request_id) for request_id in answers} == {2}


def test_canary_cannot_be_deleted(server: LiveServer) -> None:
    upload(server, "finch", 0.1)
    upload(server, "finch", 0.2)
    request(server, "PATCH", "/v1/tasks/finch", json={"canary": {"version": 1, "percent": 1}})

    refused = request(server, "DELETE", "/v1/tasks/finch/versions/1")

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_active")
    assert refused.headers["x-should-retry"] == "false"


def test_version_says_where_it_comes_from(server: LiveServer) -> None:
    made = upload(server, "origin", 0.1, training_run="run 7", data_digest="sha256:12").json()

    provenance = made["provenance"]
    assert provenance.pop("uploaded_at") == made["created"]
    assert provenance == {
        "training_run": "run 7",
        "data_digest": "sha256:12",
        "key_id": None,
        "key_label": None,
        "backbone_name": "tiny/echo",
        "backbone_fingerprint": "f" * 64,
    }


def test_probes_alone_make_no_gate(server: LiveServer) -> None:
    made = upload(server, "probed", 0.1, probes=PROBES).json()
    assert (made["state"], made["gate"]) == ("active", None)


def test_too_many_bytes_of_probes_are_413(server: LiveServer) -> None:
    refused = upload(server, "probed-much", 0.1, probes=b" " * (1024 * 1024 + 1))
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "probes")


@pytest.fixture
def ungated(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose gates nobody checks; what it was told of."""
    with running_server(data_dir) as live:
        told: list[PromptVersion] = []
        live.runtime.parts.tasks.on_pending_gate(told.append)
        yield live, told


def test_gated_version_is_inactive_until_its_gate_is_passed(ungated: tuple[LiveServer, list[PromptVersion]]) -> None:
    live, told = ungated
    upload(live, "gated", 0.1)
    made = upload(live, "gated", 0.2, probes=PROBES, gate_threshold="0.9").json()
    gate = made["gate"]
    assert (made["state"], gate["status"], gate["threshold"], gate["num_probes"]) == ("inactive", "pending", 0.9, 1)
    assert (gate["score"], gate["finished_at"], gate["activates"]) == (None, None, True)
    assert [(version.task, version.version) for version in told] == [("gated", 2)]

    for change in ({"active_version": 2}, {"canary": {"version": 2, "percent": 5}}):
        refused = request(live, "PATCH", "/v1/tasks/gated", json=change)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_not_passed")
        assert refused.headers["x-should-retry"] == "false"
    assert ask(live, "gated", "r") == 1

    store = live.runtime.store
    store.set_gate("default", "gated", 2, status="passed", score=1.0)
    seen = request(live, "GET", "/v1/tasks/gated/versions/2").json()
    assert (seen["state"], seen["gate"]["status"], seen["gate"]["score"]) == ("active", "passed", 1.0)
    assert ask(live, "gated", "r") == 2


@pytest.mark.parametrize(
    ("task", "change", "param"),
    [
        ("foxes", {"active_version": 9}, "active_version"),
        ("foxes", {"active_version": 1, "canary": {"version": 9, "percent": 5}}, "canary.version"),
        ("foxes", {"pinned": True, "canary": {"version": 9, "percent": 5}}, "canary.version"),
        ("hares", {"active_version": 1}, "task"),
        ("hares", {"pinned": True}, "task"),
    ],
)
def test_change_to_a_version_that_is_not_there_names_the_field_that_asked_for_it(
    server: LiveServer, task: str, change: dict[str, Any], param: str
) -> None:
    upload(server, "foxes", 0.1)

    refused = request(server, "PATCH", f"/v1/tasks/{task}", json=change)

    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (404, "model_not_found", param)
