"""Versions with a gate: tried after the upload by the echo engine, which answers `[task@version]text`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import NumericalError
from server.runtime import gates
from server.runtime.answers import PRIORITY
from server.runtime.gates import MAX_FAILURES_SHOWN, MAX_SHOWN_CHARS, NUM_SPARE_TOKENS
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

UNFINISHED = ("pending", "running")
Probes = Sequence[tuple[str, str]]


def upload(
    live: LiveServer, task: str, value: float, probes: Probes, *, threshold: float | None = 1.0, **fields: str
) -> httpx.Response:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in probes]
    files: dict[str, Any] = {
        "file": ("adapter_model.safetensors", make_prompt_file(value)),
        "config": ("adapter_config.json", make_prompt_config()),
        "probes": ("probes.jsonl", "\n".join(lines).encode()),
    }
    if threshold is not None:
        fields["gate_threshold"] = str(threshold)
    with live.client() as client:
        return client.post(f"/v1/tasks/{task}/versions", data=fields, files=files)


def version_of(live: LiveServer, task: str, version: int) -> dict[str, Any]:
    with live.client() as client:
        found: dict[str, Any] = client.get(f"/v1/tasks/{task}/versions/{version}").json()
    return found


def wait_for_end(live: LiveServer, task: str, version: int) -> dict[str, Any]:
    live.wait_until(lambda: version_of(live, task, version)["gate"]["status"] not in UNFINISHED)
    return version_of(live, task, version)


def wait_for_status(live: LiveServer, task: str, version: int, status: str) -> dict[str, Any]:
    live.wait_until(lambda: version_of(live, task, version)["gate"]["status"] == status)
    return version_of(live, task, version)


def run_again(live: LiveServer, task: str, version: int) -> httpx.Response:
    with live.client() as client:
        return client.post(f"/v1/tasks/{task}/versions/{version}/gate")


def good(task: str, version: int, num_probes: int = 2) -> list[tuple[str, str]]:
    return [(f"q{i}", f" [{task}@{version}]q{i}") for i in range(num_probes)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running_server(tmp_path_factory.mktemp("data")) as live:
        yield live


@pytest.fixture
def held(server: LiveServer) -> Iterator[LiveServer]:
    """The engine runs no row until its gate is opened."""
    server.engine.gate.clear()
    yield server
    server.engine.gate.set()
    server.wait_until_idle()


def test_a_version_that_passes_becomes_active(server: LiveServer) -> None:
    before = server.metric("gate_runs_total", result="passed")
    uploaded = upload(server, "passes", 0.1, good("passes", 1)).json()

    assert (uploaded["state"], uploaded["gate"]["status"], uploaded["gate"]["score"]) == ("inactive", "pending", None)
    found = wait_for_end(server, "passes", 1)
    assert (found["state"], found["gate"]["status"], found["gate"]["score"]) == ("active", "passed", 1.0)
    assert found["gate"]["detail"] == {"num_passed": 2, "failures": []}
    assert found["gate"]["finished_at"] >= found["created"]
    server.wait_for_metric(before + 1, "gate_runs_total", result="passed")
    assert (
        server.post({"model": "passes", "prompt": "x", "temperature": 0}).json()["choices"][0]["text"] == "[passes@1]x"
    )


def test_a_version_that_fails_stays_inactive_and_says_where(server: LiveServer) -> None:
    wrong = [("z" * 300, "w" * 300)] * (MAX_FAILURES_SHOWN + 1)
    upload(server, "fails", 0.1, [*good("fails", 1, 9), *wrong], threshold=0.5)

    found = wait_for_end(server, "fails", 1)

    assert (found["state"], found["gate"]["status"]) == ("inactive", "failed")
    assert found["gate"]["score"] == pytest.approx(9 / 20)
    assert found["gate"]["detail"]["num_passed"] == 9
    failures = found["gate"]["detail"]["failures"]
    assert len(failures) == MAX_FAILURES_SHOWN
    assert {len(text) for text in failures[0].values()} == {MAX_SHOWN_CHARS}
    assert failures[0]["answer"].startswith("[fails@1]z")
    assert server.post({"model": "fails", "prompt": "x"}).status_code == 404


def test_a_score_equal_to_the_threshold_passes(server: LiveServer) -> None:
    upload(server, "just", 0.1, [*good("just", 1, 1), ("x", "no")], threshold=0.5)

    assert wait_for_end(server, "just", 1)["gate"]["status"] == "passed"


def test_a_version_that_is_not_to_become_active_does_not(server: LiveServer) -> None:
    upload(server, "waits", 0.1, good("waits", 1), activate="false")

    found = wait_for_end(server, "waits", 1)

    assert (found["state"], found["gate"]["status"]) == ("inactive", "passed")


def test_probes_are_asked_greedily_behind_everybody_else(server: LiveServer) -> None:
    before = len(server.engine.submitted)
    upload(server, "asks", 0.1, [("a", "bb"), ("c", "dddd")])
    wait_for_end(server, "asks", 1)

    rows = server.engine.submitted[before:]

    assert [bytes(row.token_ids[1:]) for row in rows] == [b"a", b"c"]
    assert [row.sampling.max_tokens for row in rows] == [2 + NUM_SPARE_TOKENS, 4 + NUM_SPARE_TOKENS]
    assert {(row.priority, row.sampling.temperature) for row in rows} == {(PRIORITY, 0.0)}


def test_another_version_made_active_meanwhile_is_a_conflict(held: LiveServer) -> None:
    assert held.upload("contested", 0.1).status_code == 201
    upload(held, "contested", 0.2, good("contested", 2))
    wait_for_status(held, "contested", 2, "running")
    assert held.upload("contested", 0.3).status_code == 201

    held.engine.gate.set()

    found = wait_for_end(held, "contested", 2)
    assert (found["state"], found["gate"]["status"], found["gate"]["score"]) == ("inactive", "conflict", 1.0)
    assert version_of(held, "contested", 3)["state"] == "active"
    held.wait_for_metric(1, "gate_runs_total", result="conflict")


def test_a_gate_is_run_again_against_what_is_active_then(held: LiveServer) -> None:
    upload(held, "again", 0.1, [("q", "[again@1]q"), ("x", "no")], threshold=0.9)
    held.engine.gate.set()
    assert wait_for_end(held, "again", 1)["gate"]["status"] == "failed"
    held.engine.gate.clear()
    before = len(held.engine.submitted)

    first, second = run_again(held, "again", 1), run_again(held, "again", 1)

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["gate"]["status"] == "pending"
    assert first.json()["gate"]["score"] is None
    held.engine.gate.set()
    assert wait_for_end(held, "again", 1)["gate"]["status"] == "failed"
    assert len(held.engine.submitted) == before + 2, "the second call began nothing"


def test_progress_is_told(held: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "PROGRESS_INTERVAL_S", 0.0)
    upload(held, "long", 0.1, good("long", 1, 40))
    assert wait_for_status(held, "long", 1, "running")["gate"]["detail"] == {"num_done": 0}
    seen: list[Any] = []
    report = gates.GateRunner._report

    async def spy(runner: Any, version: Any, outcome: Any) -> Any:
        seen.append(dict(outcome.detail))
        return await report(runner, version, outcome)

    monkeypatch.setattr(gates.GateRunner, "_report", spy)
    held.engine.gate.set()

    assert wait_for_end(held, "long", 1)["gate"]["status"] == "passed"
    assert seen == [{"num_done": 32}, {"num_passed": 40, "failures": []}]


def test_what_was_answered_to_the_first_probes_does_not_pass_the_second(held: LiveServer) -> None:
    assert held.upload("moved", 0.1).status_code == 201
    upload(held, "moved", 0.2, good("moved", 2), threshold=0.0)
    wait_for_status(held, "moved", 2, "running")
    assert upload(held, "moved", 0.2, [("q", "no")], threshold=1.0).json()["gate"]["status"] == "pending"

    held.engine.gate.set()

    found = wait_for_end(held, "moved", 2)
    assert (found["state"], found["gate"]["status"], found["gate"]["score"]) == ("inactive", "failed", 0.0)


def test_failures_in_any_script_and_of_any_bytes_are_shown(server: LiveServer) -> None:
    long = "漢" * MAX_SHOWN_CHARS
    probes = [(f"{number}{long}", f"\N{GRINNING FACE}{long}") for number in range(MAX_FAILURES_SHOWN - 1)]
    upload(server, "scripts", 0.1, [*probes, ("\x01" * 99 + "\\u0000", "no")])

    found = wait_for_end(server, "scripts", 1)

    assert found["gate"]["status"] == "failed"
    assert found["gate"]["detail"]["failures"][-1]["prompt"] == "\x01" * 99 + "\\u0000"


def test_a_deleted_version_takes_its_gate_with_it(held: LiveServer) -> None:
    upload(held, "gone", 0.1, good("gone", 1))
    wait_for_status(held, "gone", 1, "running")
    with held.client() as client:
        assert client.delete("/v1/tasks/gone").status_code == 200
    held.engine.gate.set()

    upload(held, "after", 0.1, good("after", 1))

    assert wait_for_end(held, "after", 1)["gate"]["status"] == "passed"


def test_an_error_of_a_row_ends_the_gate_with_what_happened(server: LiveServer) -> None:
    server.engine.errors["broken"] = NumericalError("logits are not finite")
    try:
        upload(server, "breaks", 0.1, [("broken", "x")])
        found = wait_for_end(server, "breaks", 1)
    finally:
        server.engine.errors.clear()

    assert (found["state"], found["gate"]["status"], found["gate"]["score"]) == ("inactive", "error", None)
    assert found["gate"]["detail"] == {"message": "logits are not finite", "code": "non_finite_logits"}


def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "RETRY_S", 0.01)
    with running_server(tmp_path / "data", max_waiting_rows=2) as live:
        live.engine.gate.clear()
        refused = 0
        submit = live.engine.submit

        def counted(rows: Any) -> None:
            nonlocal refused
            try:
                submit(rows)
            except Exception:
                refused += 1
                raise

        live.engine.submit = counted  # type: ignore[method-assign]
        generation = {"model": "tiny/echo", "prompt": ["x"], "stream": True}
        with live.client() as client, client.stream("POST", "/v1/completions", json=generation):
            upload(live, "late", 0.1, good("late", 1))
            live.wait_until(lambda: refused >= 2)
            assert version_of(live, "late", 1)["gate"]["status"] == "running"
            live.engine.gate.set()
        assert wait_for_end(live, "late", 1)["gate"]["status"] == "passed"


def test_a_drain_gives_what_runs_back_and_the_next_start_takes_it_up(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as live:
        live.engine.gate.clear()
        upload(live, "first", 0.1, good("first", 1))
        upload(live, "second", 0.1, good("second", 1))
        wait_for_status(live, "first", 1, "running")
        live.runtime._loop.call_soon_threadsafe(live.runtime.start_drain)  # type: ignore[union-attr]
        store = live.runtime.store
        live.wait_until(lambda: store.get_version("default", "first", 1).gate.status == "pending")  # type: ignore[union-attr]
        live.wait_until_idle()
        assert live.engine.cancelled
    with running_server(tmp_path / "data") as live:
        for task in ("first", "second"):
            assert wait_for_end(live, task, 1)["state"] == "active"


def test_what_a_crash_left_running_is_begun_anew(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as live:
        live.engine.gate.clear()
        upload(live, "left", 0.1, good("left", 1))
        wait_for_status(live, "left", 1, "running")
        # The store as it is when the process dies: nothing is given back.
        live.runtime.parts.tasks.set_gate = lambda version, **_: version  # type: ignore[method-assign]
    with running_server(tmp_path / "data") as live:
        assert wait_for_end(live, "left", 1)["gate"]["status"] == "passed"


@pytest.mark.parametrize(
    ("path", "status", "param", "code"),
    [
        ("plain/versions/1", 400, "version", "invalid_value"),
        ("plain/versions/9", 404, "model", "model_not_found"),
        ("nobody/versions/1", 404, "model", "model_not_found"),
        ("plain/versions/0", 400, "version", "invalid_request"),
    ],
)
def test_gates_that_are_not_there_are_not_run(
    server: LiveServer, path: str, status: int, param: str, code: str
) -> None:
    server.upload("plain", 0.1)
    with server.client() as client:
        response = client.post(f"/v1/tasks/{path}/gate")

    assert response.status_code == status, response.text
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def set_quota(live: LiveServer, **limits: int) -> None:
    with live.client() as client:
        response = client.put("/v1/tenants/default/quota", json=limits)
    assert response.status_code == 200, response.text


def test_a_tenant_of_few_rows_is_asked_in_parts(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as live:
        set_quota(live, max_running_rows=3)
        upload(live, "few", 0.1, good("few", 1, 10))

        assert wait_for_end(live, "few", 1)["gate"]["status"] == "passed"
        assert len(live.engine.submitted) == 10


def test_a_quota_that_stays_used_up_ends_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "RETRY_S", 0.001)
    with running_server(tmp_path / "data") as live:
        set_quota(live, tokens_per_minute=1)
        upload(live, "poor", 0.1, good("poor", 1))

        found = wait_for_end(live, "poor", 1)

        assert found["gate"]["status"] == "error"
        assert found["gate"]["detail"]["code"] == "quota_exceeded"
        assert found["state"] == "inactive"


def test_texts_of_probes_are_shown_to_those_alone_who_may_change_the_version(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as live, live.client() as client:
        store = live.runtime.store
        keys = {
            name: {"authorization": f"Bearer {store.create_key(tenant, scopes)[1]}"}
            for name, tenant, scopes in (
                ("infer", "shared", ["infer"]),
                ("write", "shared", ["infer", "write"]),
                ("foreign", "acme", ["infer", "write"]),
                ("admin", "ops", ["admin"]),
            )
        }
        files: dict[str, Any] = {
            "file": ("adapter_model.safetensors", make_prompt_file(0.1)),
            "config": ("adapter_config.json", make_prompt_config()),
            "probes": ("probes.jsonl", b'{"prompt": "secret", "completion": "x"}'),
        }
        url = "/v1/tasks/tried/versions"
        posted = client.post(url, data={"gate_threshold": "1"}, files=files, headers=keys["write"])
        assert posted.status_code == 201

        def seen_by(name: str) -> dict[str, Any]:
            found: dict[str, Any] = client.get(f"{url}/1", headers=keys[name]).json()["gate"]
            return found

        live.wait_until(lambda: seen_by("write")["status"] == "failed")
        for name in ("write", "admin"):
            assert seen_by(name)["detail"]["failures"][0]["prompt"] == "secret"
        for name in ("infer", "foreign"):
            assert seen_by(name)["detail"] == {"num_passed": 0}
            assert "secret" not in client.get(url, headers=keys[name]).text
            assert (seen_by(name)["status"], seen_by(name)["score"]) == ("failed", 0.0)
