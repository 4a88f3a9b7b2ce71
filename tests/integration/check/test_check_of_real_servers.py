"""`promptmux check` against a real engine over a tiny random backbone: sound, and behind a proxy that swaps answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.output import ExitCode
from tests.integration.clients.tiny_server import TASKS, TinyServer, tiny_server
from tests.unit.api.live_server import serving

pytestmark = pytest.mark.usefixtures("_quiet")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    with tiny_server(tmp_path_factory.mktemp("check")) as server:
        yield server


@contextmanager
def swapping_proxy(url: str, *, keeps_digests: bool) -> Iterator[str]:
    """Hands two answers of one request to each other's task, with or without what tells them apart."""
    proxy = FastAPI()

    @proxy.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, request: Request) -> Response:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answer = await client.request(
                request.method, f"/{path}?{request.url.query}", content=await request.body(), headers=_json(request)
            )
        content = answer.content
        if path == "v1/completions" and answer.is_success:
            content = json.dumps(_swap(answer.json(), keeps_digests)).encode()
        return Response(content, answer.status_code, media_type=answer.headers["content-type"])

    with serving(proxy) as (_, port):
        yield f"http://127.0.0.1:{port}"


def _json(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name == "content-type"}


def _swap(body: dict[str, Any], keeps_digests: bool) -> dict[str, Any]:
    choices = body["choices"]
    pair = next(((a, b) for a in choices for b in choices if a.get("task") != b.get("task")), None)
    if pair is not None:
        for field in ("text", "logprobs") if keeps_digests else ("text", "logprobs", "prompt"):
            pair[0][field], pair[1][field] = pair[1][field], pair[0][field]
    return body


def check(url: str) -> Result:
    return CliRunner().invoke(app, ["check", *TASKS, "--rounds", "2", "--url", url, "--json"])


def test_a_real_engine_answers_in_company_as_it_does_alone(tiny: TinyServer) -> None:
    result = check(tiny.url)

    assert result.exit_code == ExitCode.OK, result.output
    found = json.loads(result.stdout)
    assert found["dtype"] == "float32"
    assert [item["task"] for item in found["tasks"]] == [*TASKS, None]
    assert {item["verdict"] for item in found["tasks"]} == {"same"}
    assert all(item["max_logprob_gap"] <= found["tolerance"] for item in found["tasks"])
    assert found["alike"] == []


@pytest.mark.parametrize(("keeps_digests", "told"), [(True, "alone"), (False, "digest")])
def test_answers_that_are_swapped_are_caught(tiny: TinyServer, keeps_digests: bool, told: str) -> None:
    with swapping_proxy(tiny.url, keeps_digests=keeps_digests) as url:
        result = check(url)

    assert result.exit_code == ExitCode.FAILED
    found = json.loads(result.stdout)
    assert found["sound"] is False
    faults = [fault for item in found["tasks"] for fault in item["mismatches"]]
    assert any(told in fault for fault in faults)
