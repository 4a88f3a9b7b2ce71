"""Two servers of one store in PostgreSQL, over HTTP: one's changes hold at the other, also after an outage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgresql import PostgresServer
from tests.unit.api.live_server import LiveServer, running_server


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    with postgres.database() as made:
        yield made


@pytest.fixture
def pair(url: str, tmp_path: Path) -> Iterator[tuple[LiveServer, LiveServer]]:
    with (
        running_server(tmp_path / "one", store=url) as one,
        running_server(tmp_path / "two", store=url) as two,
    ):
        yield one, two


def answered_by(live: LiveServer, task: str = "task") -> int | None:
    answer = live.post({"model": task, "prompt": "x", "max_tokens": 1})
    return answer.json()["prompt"]["version"] if answer.status_code == 200 else None


def test_upload_roll_back_pin_and_deletion_hold_at_the_other_server(pair: tuple[LiveServer, LiveServer]) -> None:
    one, two = pair
    for version, value in ((1, 0.1), (2, 0.2)):
        assert one.upload("task", value).status_code == 201
        two.wait_until(lambda v=version: answered_by(two) == v)
    with one.client() as client:
        assert client.patch("/v1/tasks/task", json={"active_version": 1, "pinned": True}).status_code == 200
        two.wait_until(lambda: answered_by(two) == 1)
        two.wait_until(lambda: [ref.version for ref in two.engine.pinned] == [1])
        two.wait_until(lambda: two.metric("prompts_registered") == 2)
        assert client.delete("/v1/tasks/task").status_code in (200, 204)
        two.wait_until(lambda: answered_by(two) is None)
    assert two.metric("store_change_lag_seconds_count") == 4
    assert one.metric("store_change_lag_seconds_count") == 0
    assert not (two.runtime.settings.data_dir / "catalog.sqlite3").exists()


def test_key_that_one_server_makes_and_revokes_counts_at_the_other(pair: tuple[LiveServer, LiveServer]) -> None:
    one, two = pair
    with one.client() as client:
        made = client.post("/v1/keys", json={"scopes": ["admin"]}).json()
        headers = {"authorization": f"Bearer {made['secret']}"}
        two.wait_until(lambda: two.post({"model": "x", "prompt": "x"}).status_code == 401)
        two.wait_until(lambda: two.post({"model": "x", "prompt": "x"}, headers=headers).status_code == 404)
        assert client.delete(f"/v1/keys/{made['id']}?force=true", headers=headers).status_code in (200, 204)
        two.wait_until(lambda: two.post({"model": "x", "prompt": "x"}, headers=headers).status_code == 401)


def test_server_answers_from_memory_while_the_database_is_away_and_refuses_changes(
    postgres: PostgresServer, pair: tuple[LiveServer, LiveServer]
) -> None:
    one, two = pair
    assert one.upload("task", 0.1).status_code == 201
    two.wait_until(lambda: answered_by(two) == 1)
    two.wait_until(lambda: two.runtime.store.resolve_remembered("default", "task") is not None)
    try:
        postgres.stop()
        two.wait_until(lambda: not two.runtime.store.health().is_reachable)
        # For longer than keys and quotas are remembered for by those who ask for them.
        two.runtime.keys._keyless_until_s = 0.0
        assert answered_by(two) == 1
        refused = two.upload("task", 0.2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["retry-after"] == "5"
        unknown = two.post({"model": "never-asked-for", "prompt": "x"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "store_unavailable")
        with two.client() as client:
            assert "promptmux_store_reachable 0.0" in client.get("/metrics").text
            assert client.get("/readyz").status_code == 200
    finally:
        postgres.start()
    two.wait_until(lambda: two.upload("task", 0.2).status_code == 201)
    one.wait_until(lambda: answered_by(one) == 2)
    with two.client() as client:
        text = client.get("/metrics").text
    assert "promptmux_store_reachable 1.0" in text
    assert two.metric("store_reconnects_total") >= 1


def test_server_whose_database_is_away_does_not_start_and_says_why(postgres: PostgresServer, tmp_path: Path) -> None:
    with running_server(tmp_path, store="postgresql://u:hunter2@/nothing?host=/nowhere") as live:
        assert live.runtime.state == "failed"
        assert "cannot be reached" in (live.runtime.failure or "")
        assert "hunter2" not in (live.runtime.failure or "")
