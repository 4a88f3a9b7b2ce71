"""What tenants may use, as they and the operator see it; and settings read anew."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompt_store.manifest import Quota
from prompt_store.store import PromptStore
from server.app import create_app
from server.settings import Settings
from server.settings_sources import load_settings
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server, serving

COMPLETION = {"model": "tiny/echo", "prompt": "four", "max_tokens": 4}


def call(live: LiveServer, method: str, path: str, key: str | None = None, **arguments: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with live.client() as client:
        return client.request(method, path, headers=headers, **arguments)


@dataclass
class Tenants:
    live: LiveServer
    admin: str
    acme: str
    other: str

    def limit(self, tenant: str = "acme", **limits: int | None) -> dict[str, Any]:
        answer = call(self.live, "PUT", f"/v1/tenants/{tenant}/quota", self.admin, json=limits)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def complete(self, key: str | None = None, **fields: Any) -> httpx.Response:
        return call(self.live, "POST", "/v1/completions", key or self.acme, json=COMPLETION | fields)

    def quota(self, key: str | None = None) -> dict[str, Any]:
        found: dict[str, Any] = call(self.live, "GET", "/v1/quota", key or self.acme).json()
        return found


@pytest.fixture
def tenants(data_dir: Path) -> Iterator[Tenants]:
    with PromptStore.open(data_dir) as store:
        admin, acme, other = (
            store.create_key(tenant, scopes)[1]
            for tenant, scopes in (("ops", ["admin"]), ("acme", ["infer", "write"]), ("other", ["infer"]))
        )
    with running_server(data_dir) as live:
        yield Tenants(live, admin, acme, other)


def test_requests_of_a_minute_run_out_for_one_tenant_alone(tenants: Tenants) -> None:
    tenants.limit(requests_per_minute=2)
    first = tenants.complete()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert tenants.complete().status_code == 200

    refused = tenants.complete()
    assert refused.status_code == 429
    assert refused.json()["error"] == {
        "message": "Rate limit reached: 2 requests a minute, 0 left, 1 needed.",
        "type": "rate_limit_error",
        "param": "requests_per_minute",
        "code": "rate_limit_exceeded",
    }
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    tenants.live.wait_for_metric(1, "requests_rejected_total", reason="rate_limit_exceeded")
    assert tenants.complete(tenants.other).status_code == 200


def test_streams_carry_the_headers_too(tenants: Tenants) -> None:
    tenants.limit(tokens_per_minute=1000)
    answer = tenants.complete(stream=True)
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | {"stream": True}),
        ("/v1/chat/completions", {"model": "tiny/echo", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/classify", {"model": "tiny/echo", "input": "x", "labels": ["a", "b"]}),
    ],
)
def test_every_route_that_spends_is_held_to_the_quota(tenants: Tenants, path: str, body: dict[str, Any]) -> None:
    assert call(tenants.live, "POST", path, tenants.acme, json=body).status_code == 200
    tenants.limit(requests_per_minute=0)
    refused = call(tenants.live, "POST", path, tenants.acme, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")


def test_tokens_that_were_not_made_are_given_back(tenants: Tenants) -> None:
    tenants.limit(tokens_per_minute=10_000)
    answer = tenants.complete(max_tokens=3000)
    tenants.live.wait_until_idle()
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] < 3000
    assert tenants.quota()["usage"]["tokens_per_minute"] <= usage["total_tokens"]
    assert tenants.quota()["usage"]["running_rows"] == 0


def test_more_rows_than_may_run_are_refused_and_those_of_others_are_not(tenants: Tenants) -> None:
    tenants.limit(max_running_rows=2)
    refused = tenants.complete(n=3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (429, "max_running_rows")
    assert tenants.complete(n=2).status_code == 200
    assert tenants.complete(tenants.other, n=3).status_code == 200


def test_stored_prompts_are_held_to_the_quota_and_listed_with_it(tenants: Tenants) -> None:
    tenants.limit(max_prompts=1)
    assert tenants.live.upload("one", 0.1, key=tenants.acme).status_code == 201
    assert tenants.live.upload("one", 0.1, key=tenants.acme).status_code == 200, "the same again is nothing more"
    refused = tenants.live.upload("two", 0.2, key=tenants.acme)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "storage_quota_exceeded")
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("30", "false")
    assert "delete versions" in refused.json()["error"]["message"]
    usage = tenants.quota()["usage"]
    assert (usage["prompts"], usage["virtual_tokens"]) == (1, 4)
    assert usage["prompt_bytes"] > 0


def test_operator_sees_all_tenants_in_pages_and_a_tenant_sees_itself(tenants: Tenants) -> None:
    tenants.limit(tenant="zeta", max_prompts=3)
    tenants.complete()
    whole = call(tenants.live, "GET", "/v1/tenants", tenants.admin).json()["data"]
    assert [item["tenant"] for item in whole] == ["acme", "ops", "other", "zeta"]
    page = call(tenants.live, "GET", "/v1/tenants?limit=2&after=acme", tenants.admin).json()
    assert ([item["tenant"] for item in page["data"]], page["has_more"]) == (["ops", "other"], True)
    assert tenants.quota()["tenant"] == "acme"
    own = call(tenants.live, "GET", "/v1/tenants/zeta/quota", tenants.admin).json()
    assert (own["max_prompts"], own["in_force"]["max_prompts"], own["requests_per_minute"]) == (3, 3, None)
    assert own["updated"] is not None


def test_limits_are_replaced_whole(tenants: Tenants) -> None:
    tenants.limit(max_prompts=3, requests_per_minute=5)
    assert tenants.limit(max_prompts=4)["requests_per_minute"] is None


def test_quota_set_beside_the_server_holds_within_a_second(tenants: Tenants, data_dir: Path) -> None:
    assert tenants.complete().status_code == 200
    with PromptStore.open(data_dir, exclusive=False) as beside:
        beside.set_quota(Quota(tenant="acme", requests_per_minute=0))
    tenants.live.wait_until(lambda: tenants.complete().status_code == 429)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("acme", {"max_prompts": -1}, "max_prompts"),
        ("acme", {"max_prompts": 10**16}, "max_prompts"),
        ("acme", {"max_prompts": True}, "max_prompts"),
        ("acme", {"max_prompts": "3"}, "max_prompts"),
        ("acme", {"max_promts": 3}, "max_promts"),
        ("..evil", {}, "tenant"),
        ("x" * 64, {}, "tenant"),
    ],
)
def test_wrong_field_is_named(tenants: Tenants, path: str, body: dict[str, Any], param: str) -> None:
    answer = call(tenants.live, "PUT", f"/v1/tenants/{path}/quota", tenants.admin, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.fixture
def reloadable(data_dir: Path, tmp_path: Path) -> Iterator[tuple[LiveServer, Path]]:
    config = tmp_path / "config.toml"
    config.write_text('log_level = "info"\n')
    parts = EchoServerParts()

    def read() -> Settings:
        return load_settings({"data_dir": data_dir}, config, {})

    app = create_app(read(), load_backbone=parts.load_backbone, make_engine=parts.make_engine, read_settings=read)
    with serving(app) as (server, port):
        live = LiveServer(server, parts, app.state.runtime, port)
        live.wait_until(lambda: live.runtime.state != "loading")
        yield live, config


def test_reload_puts_new_defaults_in_force_and_tells_what_needs_a_restart(reloadable: tuple[LiveServer, Path]) -> None:
    live, config = reloadable
    config.write_text("default_requests_per_minute = 0\nmax_rows = 3\n")
    answer = call(live, "POST", "/v1/reload")
    assert answer.json() == {
        "object": "reload",
        "changed": ["default_requests_per_minute"],
        "needs_restart": ["max_rows"],
    }
    assert live.runtime.settings.max_rows != 3
    assert live.post(COMPLETION).status_code == 429


@pytest.mark.parametrize("content", ['log_level = "loud"\n', "no_such = 1\n", "= broken", "default_max_prompts = -1\n"])
def test_wrong_settings_are_refused_and_the_old_stay_whole(reloadable: tuple[LiveServer, Path], content: str) -> None:
    live, config = reloadable
    before = live.runtime.settings
    config.write_text("default_requests_per_minute = 0\n" + content)
    answer = call(live, "POST", "/v1/reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_settings")
    assert live.runtime.settings == before
    assert live.post(COMPLETION).status_code == 200
