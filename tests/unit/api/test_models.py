"""`GET /v1/models`: one list without pages, in OpenAI's shape, however many tasks there are."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from prompt_store.store import PromptStore
from server.api import models as api
from server.api.models import ModelList
from server.runtime import tasks
from tests.unit.api.live_server import LiveServer, running_server

NAMES = ("a", "b.c", "d-e", "f_g", "h")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running_server(tmp_path_factory.mktemp("data")) as live:
        for index, name in enumerate(NAMES):
            assert live.upload(name, 0.1 * (index + 1)).status_code == 201
        assert live.upload("inactive", 0.9, activate="false").status_code == 201
        yield live


def models(live: LiveServer) -> dict[str, Any]:
    with live.client() as client:
        response = client.get("/v1/models")
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.parametrize("page", [1, 2, 5, 1000])
def test_list_is_every_model_one_by_one_whatever_is_read_at_once(
    listed: LiveServer, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(tasks, "_PAGE", page)
    with listed.client() as client:
        singly = [client.get(f"/v1/models/{name}").json() for name in ("tiny/echo", *NAMES)]

    found = models(listed)

    assert found == {"object": "list", "data": singly}
    assert ModelList.model_validate(found).model_dump() == found
    assert [list(model) for model in found["data"]] == [list(model) for model in singly]


def test_list_of_a_server_without_tasks_is_the_backbone(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_server(tmp_path_factory.mktemp("data")) as live:
        assert [model["id"] for model in models(live)["data"]] == ["tiny/echo"]


def test_list_is_read_and_written_off_the_event_loop(listed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(PromptStore, "list_callable", watched(PromptStore.list_callable))
    monkeypatch.setattr(api, "dump_json", watched(api.dump_json))
    models(listed)

    # Two pages, the second of them empty; the backbone, and the first page.
    assert len(threads) == 4
    assert all(name.startswith("promptmux-store") for name in threads)
