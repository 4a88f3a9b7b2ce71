"""Keys made, listed and revoked while the server runs."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from prompt_store.store import PromptStore
from tests.unit.api.live_server import LiveServer, running_server


def call(live: LiveServer, method: str, path: str, key: str | None = None, **arguments: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with live.client() as client:
        return client.request(method, path, headers=headers, **arguments)


def make(live: LiveServer, admin: str | None, **fields: Any) -> dict[str, Any]:
    response = call(live, "POST", "/v1/keys", admin, json=fields)
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


@pytest.fixture
def admin(data_dir: Path) -> str:
    with PromptStore.open(data_dir) as store:
        _, secret = store.create_key("ops", ["admin"])
    return secret


def test_first_key_must_be_an_admin_key_and_closes_the_server_at_once(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        refused = call(live, "POST", "/v1/keys", json={"scopes": ["infer", "write"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "scopes")
        assert call(live, "GET", "/v1/models").status_code == 200

        made = make(live, None, scopes=["admin"])
        assert made["tenant"] == "default"
        assert call(live, "GET", "/v1/models").status_code == 401
        assert call(live, "GET", "/v1/models", made["secret"]).status_code == 200


def test_key_acts_for_the_tenant_it_was_made_for_and_its_secret_is_shown_once(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        made = make(live, admin, tenant="acme", scopes=["write", "infer"], label="ci")
        assert live.upload("mine", key=made["secret"]).status_code == 201
        assert call(live, "GET", "/v1/tasks/mine", made["secret"]).json()["tenant"] == "acme"
        assert call(live, "GET", "/v1/tasks/mine", admin).status_code == 404

        listed = call(live, "GET", "/v1/keys", admin)
        assert made["secret"] not in listed.text
        (found,) = [key for key in listed.json()["data"] if key["id"] == made["id"]]
        assert (found["scopes"], found["label"], found["revoked"]) == (["infer", "write"], "ci", None)


def test_revoked_key_is_refused_at_once(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        made = make(live, admin, tenant="acme", scopes=["infer"])
        assert call(live, "GET", "/v1/models", made["secret"]).status_code == 200

        revoked = call(live, "DELETE", f"/v1/keys/{made['id']}", admin).json()
        assert revoked["revoked"] is not None
        assert call(live, "GET", "/v1/models", made["secret"]).status_code == 401
        assert call(live, "DELETE", f"/v1/keys/{made['id']}", admin).json() == revoked, "twice is as good as once"


def test_last_admin_key_is_revoked_only_by_force(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        ((last,),) = [[key["id"] for key in call(live, "GET", "/v1/keys", admin).json()["data"]]]
        make(live, admin, scopes=["infer", "write"])
        refused = call(live, "DELETE", f"/v1/keys/{last}", admin)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_admin_key")
        other = make(live, admin, scopes=["admin"])
        assert call(live, "DELETE", f"/v1/keys/{last}", admin).status_code == 200
        assert call(live, "DELETE", f"/v1/keys/{other['id']}?force=true", other["secret"]).status_code == 200
        assert call(live, "GET", "/v1/models").status_code == 401, "the last one's end opens nothing"


def test_unknown_key_is_not_found(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        answer = call(live, "DELETE", "/v1/keys/key_0", admin)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_list_comes_in_pages(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        for number in range(4):
            make(live, admin, scopes=["infer"], label=str(number))
        whole = call(live, "GET", "/v1/keys", admin).json()
        assert (len(whole["data"]), whole["has_more"]) == (5, False)
        pages: list[dict[str, Any]] = []
        after = ""
        while True:
            page = call(live, "GET", f"/v1/keys?limit=2{after}", admin).json()
            pages += page["data"]
            if not page["has_more"]:
                break
            after = f"&after={page['data'][-1]['id']}"
        assert pages == whole["data"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"scopes": "admin"}, "scopes"),
        ({"scopes": ["infer"], "tenant": "../etc"}, "tenant"),
        ({"scopes": ["infer"], "tenant": "x" * 64}, "tenant"),
        ({"scopes": ["infer"], "label": "x" * 201}, "label"),
        ({"scopes": ["infer"], "secret": "mine"}, "secret"),
    ],
)
def test_wrong_field_is_named(data_dir: Path, admin: str, body: dict[str, Any], param: str) -> None:
    with running_server(data_dir) as live:
        answer = call(live, "POST", "/v1/keys", admin, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_audit_log_says_who_made_and_revoked_it(data_dir: Path, admin: str) -> None:
    with running_server(data_dir) as live:
        made = make(live, admin, tenant="acme", scopes=["infer"])
        call(live, "DELETE", f"/v1/keys/{made['id']}", admin)
        entries = list(live.runtime.store.iter_audit("acme"))
        (own,) = [key.id for key in live.runtime.store.list_keys() if key.tenant == "ops"]
    assert [(entry.action, entry.actor) for entry in entries] == [("create_key", own), ("revoke_key", own)]
