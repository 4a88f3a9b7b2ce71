"""The `/v1/tasks` routes over a real store."""

import hashlib
import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from server.api.task_schemas import TaskList, TaskObject, TaskStatsObject, VersionList, VersionObject
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server


def get(server: LiveServer, path: str, **arguments: Any) -> Any:
    with server.client() as client:
        response = client.get(path, **arguments)
    assert response.status_code == 200, response.text
    return response.json()


def request(server: LiveServer, method: str, path: str, **arguments: Any) -> Any:
    with server.client() as client:
        return client.request(method, path, **arguments)


def upload_raw(server: LiveServer, task: str, *, file: bytes, config: bytes, **fields: Any) -> Any:
    return request(server, "POST", f"/v1/tasks/{task}/versions", files={"file": file, "config": config}, data=fields)


def test_upload_answers_with_the_version(server: LiveServer) -> None:
    response = server.upload("fresh", 0.4, metadata='{"run": 12}')

    version = VersionObject.model_validate(response.json(), strict=True)
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/tasks/fresh/versions/1"
    assert version.digest == hashlib.sha256(make_prompt_file(0.4)).hexdigest()
    assert (version.version, version.state, version.peft_type) == (1, "active", "PROMPT_TUNING")
    assert (version.num_virtual_tokens, version.bytes) == (4, len(make_prompt_file(0.4)))
    assert version.metadata == {"run": 12}
    assert version.backbone == "f" * 64
    assert version.residency == "store"
    assert get(server, "/v1/tasks/fresh/versions/1") == response.json()


def test_same_file_again_is_the_version_it_has(server: LiveServer) -> None:
    first = server.upload("twice", 0.4)
    second = server.upload("twice", 0.4)

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert server.metric("prompt_uploads_total", result="created") >= 1
    assert server.metric("prompt_uploads_total", result="existing") >= 1


def test_inactive_upload_is_called_by_version_alone(server: LiveServer) -> None:
    server.upload("staged", 0.1, activate="false")

    assert server.post({"model": "staged", "prompt": "x"}).status_code == 404
    assert server.post({"model": "staged@1", "prompt": "x"}).status_code == 200
    assert get(server, "/v1/tasks/staged")["active_version"] is None
    assert "staged" not in [model["id"] for model in get(server, "/v1/models")["data"]]


def test_lost_compare_and_swap_is_409_and_not_to_be_retried(server: LiveServer) -> None:
    server.upload("swap", 0.1)
    lost = server.upload("swap", 0.2, expected_version="0")
    won = server.upload("swap", 0.2, expected_version="1")

    assert lost.status_code == 409
    assert lost.headers["x-should-retry"] == "false"
    assert lost.json()["error"]["type"] == "conflict_error"
    assert (won.status_code, won.json()["version"]) == (201, 2)


PROBES = b'{"prompt": "x", "completion": "y"}'

BAD_FORMS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"surprise": "1"}, "surprise"),
    ({"surprise": b"x"}, {}, "surprise"),
    ({"file": None}, {}, "file"),
    ({"config": None}, {}, "config"),
    ({}, {"activate": "yes"}, "activate"),
    ({}, {"activate": ["true", "true"]}, "activate"),
    ({}, {"expected_version": "-1"}, "expected_version"),
    ({}, {"expected_version": "1.0"}, "expected_version"),
    ({}, {"expected_version": "9" * 20}, "expected_version"),
    ({}, {"task_index": "first"}, "task_index"),
    ({}, {"training_run": "x" * 201}, "training_run"),
    ({}, {"data_digest": "x\x00"}, "data_digest"),
    ({}, {"gate_threshold": "0.5"}, "probes"),
    ({"probes": PROBES}, {"gate_threshold": "1.1"}, "gate_threshold"),
    ({"probes": PROBES}, {"gate_threshold": "nan"}, "gate_threshold"),
    ({"probes": PROBES}, {"gate_threshold": "1_0"}, "gate_threshold"),
    ({"probes": b""}, {}, "probes"),
    ({"probes": b"[]"}, {}, "probes"),
    ({"probes": b'{"prompt": "x"}'}, {}, "probes"),
    ({"probes": b'{"prompt": "x", "completion": ""}'}, {}, "probes"),
    ({"probes": b'{"prompt": "x", "completion": "y", "weight": 1}'}, {}, "probes"),
    ({"probes": b'{"prompt": "x", "completion": "y"}\n' * 1001}, {}, "probes"),
    ({}, {"metadata": "[1]"}, "metadata"),
    ({}, {"metadata": "{"}, "metadata"),
    ({}, {"metadata": '{"a": NaN}'}, "metadata"),
    ({}, {"metadata": '{"a": 1, "a": 2}'}, "metadata"),
    ({}, {"metadata": '{"a": "\\ud800"}'}, "metadata"),
    ({"metadata": b"{}"}, {}, "metadata"),
]


@pytest.mark.parametrize(("files", "fields", "param"), BAD_FORMS)
def test_bad_form_is_named_and_nothing_is_stored(
    server: LiveServer, files: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    good = {"file": make_prompt_file(), "config": make_prompt_config()}
    sent = {name: value for name, value in (good | files).items() if value is not None}

    response = request(server, "POST", "/v1/tasks/bad-form/versions", files=sent, data=fields)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert request(server, "GET", "/v1/tasks/bad-form").status_code == 404


BAD_FILES: list[tuple[bytes, bytes, int, str]] = [
    (b"", make_prompt_config(), 415, "unsupported_file"),
    (b"PK\x03\x04" + b"\0" * 100, make_prompt_config(), 415, "unsupported_file"),
    (b"\x80\x04\x95" + b"\0" * 100, make_prompt_config(), 415, "unsupported_file"),
    (make_prompt_file()[:-1], make_prompt_config(), 415, "unsupported_file"),
    (make_prompt_file() + b"\0", make_prompt_config(), 415, "unsupported_file"),
    (make_prompt_file(float("nan")), make_prompt_config(), 422, "prompt_mismatch"),
    (make_prompt_file(hidden_size=16), make_prompt_config(hidden_size=16), 422, "prompt_mismatch"),
    (make_prompt_file(), b"{", 400, "invalid_config"),
    (make_prompt_file(), b"[]", 400, "invalid_config"),
    (make_prompt_file(), make_prompt_config(peft_type="LORA"), 400, "invalid_config"),
    (make_prompt_file(), b'{"peft_type": "PROMPT_TUNING", "peft_type": "LORA"}', 400, "invalid_config"),
]


@pytest.mark.parametrize(("file", "config", "status", "code"), BAD_FILES, ids=lambda value: ascii(value)[:40])
def test_bad_file_has_its_status_and_nothing_is_stored(
    server: LiveServer, file: bytes, config: bytes, status: int, code: str
) -> None:
    registered = server.metric("prompts_registered")

    response = upload_raw(server, "bad-file", file=file, config=config)

    error = response.json()["error"]
    assert (response.status_code, error["code"]) in {(status, code), (415, "unsupported_file")}, error
    if status != 422:
        assert response.status_code == status
    assert request(server, "GET", "/v1/tasks/bad-file").status_code == 404
    assert server.metric("prompts_registered") == registered
    assert server.metric("prompt_uploads_total", result=error["code"]) >= 1


def test_mismatch_says_what_was_found_and_what_is_needed(server: LiveServer) -> None:
    response = upload_raw(
        server, "wide", file=make_prompt_file(hidden_size=16), config=make_prompt_config(hidden_size=16)
    )

    assert response.status_code == 422
    assert "16" in response.json()["error"]["message"]
    assert "8" in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"--b\r\nbroken"])
def test_broken_multipart_is_400(server: LiveServer, content: bytes) -> None:
    response = request(
        server,
        "POST",
        "/v1/tasks/broken/versions",
        content=content,
        headers={"content-type": "multipart/form-data; boundary=b"},
    )

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_upload_must_be_multipart(server: LiveServer) -> None:
    response = request(server, "POST", "/v1/tasks/broken/versions", json={"file": "/etc/passwd"})

    assert response.json()["error"]["code"] == "unsupported_content_type"


@pytest.mark.parametrize("name", ["Upper", "-dash", "a..b", "x" * 64, "tiny%2Fecho", "%00"])
def test_bad_names_cannot_be_uploaded_to(server: LiveServer, name: str) -> None:
    assert server.upload(name).status_code in (400, 404)
    assert request(server, "GET", f"/v1/tasks/{name}").status_code in (400, 404)


def test_rollout_and_rollback_are_compare_and_swap(server: LiveServer) -> None:
    server.upload("roll", 0.1)
    server.upload("roll", 0.2)

    def patch(**change: Any) -> Any:
        return request(server, "PATCH", "/v1/tasks/roll", json=change)

    back = patch(active_version=1, expected_version=2)
    assert TaskObject.model_validate(back.json(), strict=True).active_version == 1
    assert patch(active_version=2, expected_version=2).status_code == 409
    assert patch(active_version=9).status_code == 404
    assert get(server, "/v1/tasks/roll")["active_version"] == 1
    assert [v["state"] for v in get(server, "/v1/tasks/roll/versions")["data"]] == ["inactive", "active"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, None),
        ({"canary": {"version": 1, "percent": 0}}, "canary.percent"),
        ({"canary": {"version": 1, "percent": 100}}, "canary.percent"),
        ({"canary": {"version": 1}}, "canary.percent"),
        ({"canary": {"version": 1, "percent": 5, "colour": "red"}}, "canary.colour"),
        ({"canary": 5}, "canary"),
        ({"active_version": "1"}, "active_version"),
        ({"active_version": 0}, "active_version"),
        ({"active_version": 10**12}, "active_version"),
        ({"pinned": 1}, "pinned"),
        ({"colour": "red"}, "colour"),
        ({"expected_version": 1}, None),
    ],
)
def test_bad_patch_is_named(server: LiveServer, change: dict[str, Any], param: str | None) -> None:
    response = request(server, "PATCH", "/v1/tasks/capital", json=change)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_pin_reaches_the_engine_and_follows_the_active_version(server: LiveServer) -> None:
    server.upload("pinned", 0.1)
    assert request(server, "PATCH", "/v1/tasks/pinned", json={"pinned": True}).json()["pinned"] is True
    assert [(ref.task, ref.version) for ref in server.engine.pinned] == [("pinned", 1)]

    server.upload("pinned", 0.2)
    assert [(ref.task, ref.version) for ref in server.engine.pinned] == [("pinned", 2)]

    request(server, "DELETE", "/v1/tasks/pinned")
    assert server.engine.pinned == ()


def test_active_version_cannot_be_deleted_and_others_are_evicted(server: LiveServer) -> None:
    server.upload("gone", 0.123)  # which no other task has
    server.upload("gone", 0.2)

    refused = request(server, "DELETE", "/v1/tasks/gone/versions/2")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "version_active"
    assert refused.headers["x-should-retry"] == "false"

    server.post({"model": "gone@1", "prompt": "x"})
    digest = get(server, "/v1/tasks/gone/versions/1")["digest"]
    deleted = request(server, "DELETE", "/v1/tasks/gone/versions/1")
    assert deleted.json() == {"object": "prompt_version", "task": "gone", "version": 1, "deleted": True}
    assert any(digest in key for key in server.engine.evicted)
    assert request(server, "GET", "/v1/tasks/gone/versions/1").status_code == 404
    assert server.post({"model": "gone@1", "prompt": "x"}).status_code == 404
    assert server.post({"model": "gone", "prompt": "x"}).status_code == 200


def test_deleted_task_is_gone_and_its_name_stays_taken(server: LiveServer) -> None:
    server.upload("doomed", 0.1)
    server.post({"model": "doomed", "prompt": "x"})

    assert request(server, "DELETE", "/v1/tasks/doomed").json()["deleted"] is True
    assert request(server, "DELETE", "/v1/tasks/doomed").status_code == 404
    assert request(server, "GET", "/v1/tasks/doomed").status_code == 404
    assert server.post({"model": "doomed", "prompt": "x"}).status_code == 404
    assert server.upload("doomed", 0.1).status_code == 409


def test_rows_in_flight_finish_when_their_task_is_deleted(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.upload("short-lived", 0.1)
        live.post({"model": "short-lived", "prompt": "x"})
        live.engine.gate.clear()
        answers: list[Any] = []
        body = {"model": "short-lived", "prompt": "y", "temperature": 0, "max_tokens": 64}
        asking = Thread(target=lambda: answers.append(live.post(body)))
        asking.start()
        live.engine.wait_for(lambda engine: engine.num_rows == 1)
        # The echo engine keeps its prefix for rows that hold it, as the real one does.
        live.engine.evict = lambda prefix_key: None  # type: ignore[method-assign]
        assert request(live, "DELETE", "/v1/tasks/short-lived").status_code == 200
        live.engine.gate.set()
        asking.join()

    assert answers[0].json()["choices"][0]["text"] == "[short-lived@1]y"


def test_downloads_are_the_bytes_as_uploaded_with_the_digest_as_etag(server: LiveServer) -> None:
    file, config = make_prompt_file(0.77), b"\n " + make_prompt_config() + b"\n"
    digest = upload_raw(server, "bytes", file=file, config=config).json()["digest"]

    for name, content in (("file", file), ("config", config)):
        path = f"/v1/tasks/bytes/versions/1/{name}"
        response = request(server, "GET", path)
        assert response.content == content
        assert response.headers["etag"] == f'"{digest}"'
        for tag in (f'"{digest}"', f'W/"{digest}"', f'"x", "{digest}"', "*"):
            unchanged = request(server, "GET", path, headers={"if-none-match": tag})
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            assert unchanged.headers["etag"] == f'"{digest}"'
        assert request(server, "GET", path, headers={"if-none-match": '"other"'}).status_code == 200


def test_lists_page_by_the_last_item(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        for number in range(5):
            live.upload(f"t{number}", number / 10)
        for number in range(3):
            live.upload("t0", 1 + number / 10)

        names: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = TaskList.model_validate(get(live, "/v1/tasks", params={"limit": 2, **after}), strict=True)
            names += [task.task for task in page.data]
            if not page.has_more:
                break
            after = {"after": names[-1]}
        first = VersionList.model_validate(get(live, "/v1/tasks/t0/versions", params={"limit": 3}), strict=True)
        rest = get(live, "/v1/tasks/t0/versions", params={"limit": 3, "after": first.data[-1].version})

    assert names == ["t0", "t1", "t2", "t3", "t4"]
    assert [version.version for version in first.data] == [4, 3, 2]
    assert first.has_more
    assert [version["version"] for version in rest["data"]] == [1]
    assert not rest["has_more"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/tasks?limit=0", "limit"),
        ("/v1/tasks?limit=1001", "limit"),
        ("/v1/tasks?limit=many", "limit"),
        ("/v1/tasks?page=2", "page"),
        ("/v1/tasks/capital/versions?after=x", "after"),
        ("/v1/tasks/capital/versions/latest", "version"),
        ("/v1/tasks/capital/versions/0", "version"),
        ("/v1/tasks/capital/versions/99999999999999999999", "version"),
    ],
)
def test_bad_query_and_path_are_named(server: LiveServer, path: str, param: str) -> None:
    response = request(server, "GET", path)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_stats_count_requests_tokens_and_latencies(server: LiveServer) -> None:
    server.upload("counted", 0.1)
    server.post({"model": "counted", "prompt": ["a", "b"], "n": 2, "max_tokens": 3})
    server.post({"model": "counted@1", "prompt": "a", "max_tokens": 64, "stream": True, "temperature": 0})
    server.wait_until_idle()

    stats = TaskStatsObject.model_validate(get(server, "/v1/tasks/counted/stats"), strict=True)
    assert (stats.requests, stats.rows, stats.prompt_tokens) == (2, 5, 6)
    assert stats.completion_tokens == 4 * 3 + len("[counted@1]a") + 1
    assert stats.finish_reasons == {"length": 4, "stop": 1}
    assert stats.time_to_first_token_seconds.num_samples == 2
    assert stats.e2e_request_latency_seconds.p99 is not None


def test_demo_prompts_are_shared_added_once_and_never_overwritten(data_dir: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    for name, value, hidden_size in (("first", 0.1, 8), ("second", 0.2, 8), ("misfit", 0.3, 16)):
        (demo / name).mkdir(parents=True)
        (demo / name / "adapter_model.safetensors").write_bytes(make_prompt_file(value, hidden_size=hidden_size))
        (demo / name / "adapter_config.json").write_bytes(make_prompt_config(hidden_size=hidden_size))
    (demo / "README.md").write_text("not a prompt")

    with running_server(data_dir, demo_dir=demo) as live:
        tasks = get(live, "/v1/tasks")["data"]
        assert [(task["task"], task["tenant"], task["active_version"]) for task in tasks] == [
            ("first", "shared", 1), ("second", "shared", 1),
        ]  # fmt: skip
        assert live.post({"model": "first", "prompt": "x"}).status_code == 200
        # The local caller has every scope, so it may take a demo away.
        assert request(live, "DELETE", "/v1/tasks/second").status_code == 200
    (demo / "first" / "adapter_model.safetensors").write_bytes(make_prompt_file(0.9))
    with running_server(data_dir, demo_dir=demo) as live:
        tasks = get(live, "/v1/tasks")["data"]

    assert [(task["task"], task["num_versions"]) for task in tasks] == [("first", 1)]


def test_metadata_survives_a_restart(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.upload("kept", 0.1, metadata=json.dumps({"labels": ["é", 1, None]}))
        before = get(live, "/v1/tasks/kept/versions/1")
    with running_server(data_dir) as live:
        after = get(live, "/v1/tasks/kept/versions/1")
        assert live.metric("prompts_registered") == 1

    assert before == after
    assert after["metadata"] == {"labels": ["é", 1, None]}
