"""`/v1/audit`: changes and receipts as JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prompt_store.store import PromptStore
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server

TENANTS = ("acme", "zeta")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[str, str]]]:
    """Two tenants, each with a task `capital` and one request, and the secrets of their keys."""
    data_dir = tmp_path_factory.mktemp("audit")
    with PromptStore.open(data_dir) as store:
        keys = {tenant: store.create_key(tenant, ["infer", "write"])[1] for tenant in TENANTS}
        keys["admin"] = store.create_key("acme", ["admin"])[1]
    with running_server(data_dir) as live:
        for tenant in TENANTS:
            assert live.upload("capital", 0.1, key=keys[tenant]).status_code == 201
            ask(live, keys[tenant], f"request-of-{tenant}")
        yield live, keys


def ask(live: LiveServer, key: str, request_id: str, model: str = "capital") -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": 3, "temperature": 0}
    answer = live.post(body, headers={"authorization": f"Bearer {key}", "x-request-id": request_id})
    assert answer.status_code == 200, answer.text
    return answer.json()


def get(live: LiveServer, key: str, **query: Any) -> Any:
    with live.client(headers={"authorization": f"Bearer {key}"}) as client:
        return client.get("/v1/audit", params=query)


def lines(live: LiveServer, key: str, **query: Any) -> list[dict[str, Any]]:
    response = get(live, key, **query)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def receipts(live: LiveServer, key: str, num_expected: int, **query: Any) -> list[dict[str, Any]]:
    """They are written after the answer: waits until there are enough."""
    live.wait_until(lambda: len(lines(live, key, kind="receipts", **query)) >= num_expected)
    return lines(live, key, kind="receipts", **query)


def test_receipt_says_which_digest_answered_which_request(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    answer = ask(live, keys["zeta"], "wanted")

    (found,) = receipts(live, keys["admin"], 1, tenant="zeta", request_id="wanted")

    assert found["digest"] == answer["prompt"]["digest"]
    assert (found["task"], found["version"], found["owner"], found["tenant"]) == ("capital", 1, "zeta", "zeta")
    assert (found["endpoint"], found["outcome"], found["num_rows"]) == ("/v1/completions", "length", 1)
    assert found["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert found["key_id"].startswith("key_")


def test_bare_backbone_leaves_a_receipt_without_a_prompt(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    ask(live, keys["acme"], "bare", model="tiny/echo")
    (found,) = receipts(live, keys["admin"], 1, request_id="bare")
    assert [found[name] for name in ("owner", "task", "version", "digest")] == [None] * 4


def test_own_tenant_is_the_default_and_others_are_asked_for(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    receipts(live, keys["admin"], 2, tenant="*")
    for kind in ("changes", "receipts"):
        found = {
            name: {line["tenant"] for line in lines(live, keys["admin"], kind=kind, **query)}
            for name, query in (("own", {}), ("zeta", {"tenant": "zeta"}), ("all", {"tenant": "*"}))
        }
        assert found == {"own": {"acme"}, "zeta": {"zeta"}, "all": {"acme", "zeta"}}


def test_changes_say_who_did_what(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    found = lines(live, keys["admin"], tenant="zeta")
    assert [(line["action"], line["task"], line["version"]) for line in found] == [
        ("create_key", None, None),
        ("upload", "capital", 1),
    ]
    assert found[1]["actor"] == found[0]["detail"]["key"]
    assert lines(live, keys["admin"], tenant="zeta", task="capital") == found[1:]


def test_pages_follow_each_other_without_gap_or_repetition(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    everything = lines(live, keys["admin"], tenant="*")
    paged: list[dict[str, Any]] = []
    while page := lines(live, keys["admin"], tenant="*", limit=2, after=paged[-1]["id"] if paged else 0):
        assert len(page) <= 2
        paged += page
    assert paged == everything
    assert [line["id"] for line in everything] == sorted(line["id"] for line in everything)


def test_only_admins_may_look(audited: tuple[LiveServer, dict[str, str]]) -> None:
    live, keys = audited
    assert get(live, keys["acme"]).status_code == 403
    assert get(live, "wrong").status_code == 401


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"kind": "secrets"}, "kind"),
        ({"after": "-1"}, "after"),
        ({"after": "9" * 30}, "after"),
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"tenant": "t" * 64}, "tenant"),
        ({"request_id": "r"}, "request_id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_query_is_named(audited: tuple[LiveServer, dict[str, str]], query: dict[str, str], param: str) -> None:
    live, keys = audited
    response = get(live, keys["admin"], **query)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_receipts_of_the_last_requests_are_written_before_the_server_ends(data_dir: Path) -> None:
    with running_server(data_dir, parts=EchoServerParts()) as live:
        answer = live.post({"model": "tiny/echo", "prompt": "x"}, headers={"x-request-id": "last"})
        assert answer.status_code == 200
    with PromptStore.open(data_dir) as store:
        assert [receipt.request_id for receipt in store.iter_receipts()] == ["last"]


def test_no_receipts_when_none_are_to_be_kept(data_dir: Path) -> None:
    with running_server(data_dir, receipts_max_rows=0) as live:
        assert live.post({"model": "tiny/echo", "prompt": "x"}).status_code == 200
    with PromptStore.open(data_dir) as store:
        assert list(store.iter_receipts()) == []
