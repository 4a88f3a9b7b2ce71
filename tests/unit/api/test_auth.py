"""Keys, scopes and tenants: closed by default, and no tenant sees another's tasks."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import event

from prompt_store.store import PromptStore
from server.api.auth import OPEN_PATHS, required_scope
from server.app import ROUTERS, create_app
from server.settings import Settings
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

ROUTES = [
    (method, re.sub(r"\{[^}]*\}", "1", route.path))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]
UNROUTED = [("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/redoc"), ("GET", "/nope"), ("POST", "/v1/nope")]


class Keys:
    def __init__(self, data_dir: Path) -> None:
        with PromptStore.open(data_dir) as store:
            self.ids: dict[str, str] = {}
            self.infer = self._make(store, "acme", ["infer"])
            self.write = self._make(store, "acme", ["write"])
            self.admin = self._make(store, "acme", ["admin"])
            self.other = self._make(store, "other", ["infer", "write"])
            self.shared = self._make(store, "shared", ["write"])

    def _make(self, store: PromptStore, tenant: str, scopes: list[str]) -> str:
        key, secret = store.create_key(tenant, scopes)
        self.ids[secret] = key.id
        return secret


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Keys]]:
    data_dir = tmp_path_factory.mktemp("data")
    keys = Keys(data_dir)
    with running_server(data_dir) as live:
        assert live.upload("mine", 0.1, key=keys.write).status_code == 201
        assert live.upload("theirs", 0.2, key=keys.other).status_code == 201
        assert live.upload("common", 0.3, key=keys.shared).status_code == 201
        assert live.upload("both", 0.4, key=keys.shared).status_code == 201
        assert live.upload("both", 0.5, key=keys.write).status_code == 201
        yield live, keys


def call(live: LiveServer, method: str, path: str, key: str | None = None, **arguments: Any) -> httpx.Response:
    headers = ({"authorization": f"Bearer {key}"} if key else {}) | arguments.pop("headers", {})
    with live.client() as client:
        return client.request(method, path, headers=headers, **arguments)


def test_the_walk_sees_every_route(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    documented = call(live, "GET", "/openapi.json", keys.infer).json()["paths"]

    assert set(documented) == {
        route.path.replace(":path", "") for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)
    }
    assert len(ROUTES) > 15


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] not in OPEN_PATHS] + UNROUTED)
def test_every_other_route_needs_a_key(keyed: tuple[LiveServer, Keys], method: str, path: str) -> None:
    live, _ = keyed
    wrong = ["", "Bearer", "Bearer pm_wrong", "Basic pm_wrong", "bearer \xff\xfe", "Bearer " + "x" * 8000]
    with live.client() as client:
        answers = [client.request(method, path)]
        answers += [client.request(method, path, headers={"authorization": text.encode("latin-1")}) for text in wrong]

    for response in answers:
        assert response.status_code == 401, response.text
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_open_routes_need_none(keyed: tuple[LiveServer, Keys], path: str) -> None:
    assert call(keyed[0], "GET", path).status_code == 200


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] not in OPEN_PATHS])
def test_every_route_has_a_scope(method: str, path: str) -> None:
    assert required_scope(method, path) is not None


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"])
def test_no_method_of_any_path_of_the_app_goes_without_a_key(keyed: tuple[LiveServer, Keys], method: str) -> None:
    app = create_app(Settings())
    paths = sorted({re.sub(r"\{[^}]*\}", "1", str(getattr(route, "path", ""))) for route in app.routes})
    assert {"/docs", "/openapi.json"} < set(paths)
    with keyed[0].client() as client:
        for path in paths:
            if path not in OPEN_PATHS:
                assert client.request(method, path).status_code == 401, path


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] not in OPEN_PATHS])
def test_every_route_refuses_a_key_that_lacks_its_scope(keyed: tuple[LiveServer, Keys], method: str, path: str) -> None:
    live, keys = keyed
    lacking = {"infer": [keys.write], "write": [keys.infer], "admin": [keys.infer, keys.write, keys.other]}
    scope = required_scope(method, path)
    assert scope is not None
    for key in lacking[scope]:
        answer = call(live, method, path, key)
        assert answer.status_code == 403, answer.text
        assert answer.json()["error"]["code"] == "insufficient_scope"


def test_refusals_are_counted_under_their_route(keyed: tuple[LiveServer, Keys]) -> None:
    live, _ = keyed
    for path, endpoint in (("/v1/tasks/mine", "/v1/tasks/{task}"), ("/nope", "other")):
        before = live.metric("requests_total", endpoint=endpoint, status="401")
        call(live, "GET", path)
        live.wait_for_metric(before + 1, "requests_total", endpoint=endpoint, status="401")


def test_scopes_are_asked_for(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    completion = {"json": {"model": "mine", "prompt": "x"}}

    assert call(live, "POST", "/v1/completions", keys.infer, **completion).status_code == 200
    assert call(live, "POST", "/v1/completions", keys.admin, **completion).status_code == 200
    refused = call(live, "POST", "/v1/completions", keys.write, **completion)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_scope"
    assert call(live, "PATCH", "/v1/tasks/mine", keys.infer, json={"pinned": True}).status_code == 403
    assert call(live, "DELETE", "/v1/tasks/mine", keys.infer).status_code == 403
    assert call(live, "GET", "/v1/tasks/mine/versions/1/file", keys.infer).status_code == 403
    assert call(live, "GET", "/v1/tasks/mine/versions/1/file", keys.write).status_code == 200
    assert live.upload("mine", 0.9, key=keys.infer).status_code == 403


def test_own_name_comes_before_the_shared_one(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed

    def digest(key: str) -> str:
        answer = call(live, "POST", "/v1/completions", key, json={"model": "both", "prompt": "x"}).json()
        return str(answer["prompt"]["digest"])

    assert digest(keys.infer) != digest(keys.other)
    assert call(live, "GET", "/v1/tasks/both", keys.infer).json()["tenant"] == "acme"
    assert call(live, "GET", "/v1/tasks/both", keys.other).json()["tenant"] == "shared"


def test_deleted_own_name_still_shadows_the_shared_one(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    assert live.upload("veiled", 0.3, key=keys.shared).status_code == 201
    assert live.upload("veiled", 0.4, key=keys.write).status_code == 201
    assert call(live, "DELETE", "/v1/tasks/veiled", keys.write).status_code == 200

    for key, status in ((keys.infer, 404), (keys.other, 200)):
        assert call(live, "GET", "/v1/tasks/veiled", key).status_code == status
        assert call(live, "POST", "/v1/completions", key, json={"model": "veiled", "prompt": "x"}).status_code == status
        listed = [task["task"] for task in call(live, "GET", "/v1/tasks", key).json()["data"]]
        assert ("veiled" in listed) is (status == 200)
    assert call(live, "DELETE", "/v1/tasks/veiled", keys.admin).status_code == 404
    assert call(live, "DELETE", "/v1/tasks/veiled", keys.shared).status_code == 200


def test_foreign_task_is_the_same_404_as_an_unknown_one(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed

    def ask(method: str, path: str, name: str) -> tuple[int, str]:
        body = {"json": {"model": name, "prompt": "x"}} if method == "POST" else {}
        if method == "PATCH":
            body = {"json": {"pinned": True}}
        response = call(live, method, path.replace("NAME", name), keys.admin, **body)
        return response.status_code, response.text.replace(name, "NAME")

    for method, path in [
        ("POST", "/v1/completions"),
        ("GET", "/v1/models/NAME"),
        ("GET", "/v1/tasks/NAME"),
        ("GET", "/v1/tasks/NAME/versions"),
        ("GET", "/v1/tasks/NAME/versions/1"),
        ("GET", "/v1/tasks/NAME/versions/1/file"),
        ("GET", "/v1/tasks/NAME/stats"),
        ("PATCH", "/v1/tasks/NAME"),
        ("DELETE", "/v1/tasks/NAME"),
        ("DELETE", "/v1/tasks/NAME/versions/1"),
    ]:
        foreign, unknown = ask(method, path, "theirs"), ask(method, path, "nobody")
        assert foreign == unknown, path
        assert foreign[0] == 404


def test_foreign_task_costs_the_same_queries_as_an_unknown_one(keyed: tuple[LiveServer, Keys]) -> None:
    """What takes the time is the same, so that a clock tells no more than the body."""
    live, keys = keyed
    statements: list[str] = []
    engine = live.runtime.store._database.engine

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if threading.current_thread().name.startswith("promptmux-store"):  # receipts are written in between
            statements.append(statement)

    def queries(method: str, path: str) -> list[str]:
        # The key is looked up once a second, by whichever request finds it stale.
        call(live, "GET", "/v1/models", keys.admin)
        statements.clear()
        body = {"json": {"model": path.rsplit("=", 1)[-1], "prompt": "x"}} if method == "POST" else {}
        assert call(live, method, path.split("=")[0], keys.admin, **body).status_code == 404
        # So are quotas, in transactions of their own.
        passing = ("BEGIN", "FROM keys", "quotas")
        return [statement for statement in statements if not any(word in statement for word in passing)]

    event.listen(engine, "before_cursor_execute", note)
    try:
        for method, path in [
            ("POST", "/v1/completions=NAME"),
            ("GET", "/v1/models/NAME"),
            ("GET", "/v1/tasks/NAME"),
            ("GET", "/v1/tasks/NAME/versions"),
            ("GET", "/v1/tasks/NAME/versions/1/file"),
            ("GET", "/v1/tasks/NAME/stats"),
        ]:
            foreign = queries(method, path.replace("NAME", "theirs"))
            assert foreign, path
            assert foreign == queries(method, path.replace("NAME", "nobody")), path
    finally:
        event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("setting", [{"metrics_key_required": "on"}, {"metrics_port": 0}])
def test_metrics_need_a_key_where_the_settings_say_so(data_dir: Path, setting: dict[str, Any]) -> None:
    with PromptStore.open(data_dir) as store:
        _, secret = store.create_key("acme", ["infer"])
    with running_server(data_dir, **setting) as live:
        assert call(live, "GET", "/metrics").status_code == 401
        assert "promptmux_build" in call(live, "GET", "/metrics", secret).text
        assert call(live, "GET", "/readyz").status_code == 200


def test_lists_show_own_and_shared_tasks_alone(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed

    tasks = call(live, "GET", "/v1/tasks", keys.infer).json()["data"]
    models = call(live, "GET", "/v1/models", keys.infer).json()["data"]

    assert [(task["task"], task["tenant"]) for task in tasks] == [
        ("both", "acme"), ("common", "shared"), ("mine", "acme"),
    ]  # fmt: skip
    assert [model["id"] for model in models] == ["tiny/echo", "both", "common", "mine"]


def test_writing_to_shared_needs_admin(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    change = {"json": {"pinned": True}}

    assert call(live, "PATCH", "/v1/tasks/common", keys.write, **change).status_code == 404
    assert call(live, "PATCH", "/v1/tasks/common", keys.admin, **change).json()["tenant"] == "shared"


@pytest.mark.parametrize("path", ["file", "config", "inspect", "inspect?against=1"])
def test_what_a_prompt_is_made_of_is_its_owners_to_read_however_many_may_call_it(
    keyed: tuple[LiveServer, Keys], path: str
) -> None:
    live, keys = keyed
    url = f"/v1/tasks/common/versions/1/{path}"

    refused = call(live, "GET", url, keys.other)
    assert call(live, "GET", "/v1/tasks/common/versions/1", keys.other).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    etag = call(live, "GET", "/v1/tasks/common/versions/1/file", keys.shared).headers["etag"]
    assert call(live, "GET", url, keys.other, headers={"if-none-match": etag}).status_code == 403
    for allowed in (keys.shared, keys.admin):
        assert call(live, "GET", url, allowed).status_code == 200
    assert call(live, "GET", f"/v1/tasks/theirs/versions/1/{path}", keys.other).status_code == 200
    assert call(live, "GET", f"/v1/tasks/mine/versions/1/{path}", keys.other).status_code == 404


def test_stats_count_the_callers_own_use(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    for _ in range(3):
        call(live, "POST", "/v1/completions", keys.infer, json={"model": "common", "prompt": "x"})

    assert call(live, "GET", "/v1/tasks/common/stats", keys.infer).json()["requests"] == 3
    assert call(live, "GET", "/v1/tasks/common/stats", keys.other).json()["requests"] == 0


def test_revoked_key_stops_within_its_second_and_the_last_one_opens_nothing(data_dir: Path) -> None:
    with PromptStore.open(data_dir) as store:
        key, secret = store.create_key("acme", ["infer"])
    with running_server(data_dir) as live:
        assert call(live, "GET", "/v1/models", secret).status_code == 200
        with PromptStore.open(data_dir, exclusive=False) as beside:
            beside.revoke_key(key.id)

        live.wait_until(lambda: call(live, "GET", "/v1/models", secret).status_code == 401)
        assert call(live, "GET", "/v1/models").status_code == 401


def test_first_key_closes_a_running_server(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        assert call(live, "GET", "/v1/models").status_code == 200
        with PromptStore.open(data_dir, exclusive=False) as beside:
            _, secret = beside.create_key("acme", ["infer"])

        live.wait_until(lambda: call(live, "GET", "/v1/models").status_code == 401)
        assert call(live, "GET", "/v1/models", secret).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"), [(None, 200), ("SELF", 200), ("https://evil.example", 403), ("null", 403), ("http://[", 403)]
)
def test_pages_of_other_origins_are_refused_without_keys(server: LiveServer, origin: str | None, status: int) -> None:
    headers = {"origin": origin.replace("SELF", server.url)} if origin else {}

    assert server.post({"model": "capital", "prompt": "x"}, headers=headers).status_code == status


def test_a_foreign_name_that_points_at_this_machine_is_a_foreign_origin(server: LiveServer) -> None:
    port = server.url.rsplit(":", 1)[1]
    headers = {"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}

    assert server.post({"model": "capital", "prompt": "x"}, headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/v1/models", "/v1/tasks/capital/versions/1/file", "/openapi.json", "/docs"])
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:PORT", 200),
        ("LocalHost", 200),
        ("127.0.0.1:PORT", 200),
        ("127.8.9.1", 200),
        ("[::1]:PORT", 200),
        ("evil.example:PORT", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("", 403),
        ("[::1", 403),
        ("evil.example@localhost", 403),
    ],
)
def test_without_keys_only_names_of_this_machine_are_answered(
    server: LiveServer, path: str, host: str, status: int
) -> None:
    """A page that has made its own name point here sends no Origin when it reads from what it calls itself."""
    with server.client() as client:
        answer = client.get(path, headers={"host": host.replace("PORT", str(server.port))})

    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "cross_origin"


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_are_answered_under_any_name(server: LiveServer, path: str) -> None:
    with server.client() as client:
        assert client.get(path, headers={"host": "promptmux.monitoring.svc:8000"}).status_code == 200


def test_with_keys_any_name_is_answered(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    headers = {"host": "promptmux.example", "authorization": f"Bearer {keys.infer}"}
    with live.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_upload_by_a_key_names_it(keyed: tuple[LiveServer, Keys]) -> None:
    live, keys = keyed
    files = {"file": make_prompt_file(0.7), "config": make_prompt_config()}

    made = call(live, "POST", "/v1/tasks/named/versions", keys.write, files=files).json()

    assert made["created_by"] == keys.ids[keys.write]
