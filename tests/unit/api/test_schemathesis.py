"""Requests drawn from the OpenAPI document, sound and unsound: every answer is one that the document tells of."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from prompt_store.store import PromptStore
from server.app import create_app
from server.settings import Settings
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MAX_EXAMPLES = 20
MESSAGES = [{"role": "user", "content": "x"}]
GOOD_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/classify": {"input": "x", "labels": ["a", "b"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
STREAMING = ("/v1/completions", "/v1/chat/completions")
DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]

_serials = itertools.count()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def key(data_dir: Path) -> str:
    """There from the start: requests that make keys would otherwise close a server that had none."""
    with PromptStore.open(data_dir) as store:
        return store.create_key("default", ["admin"])[1]


@pytest.fixture(scope="module")
def live(data_dir: Path, key: str) -> Iterator[LiveServer]:
    """A server of its own: these requests delete what they can."""
    with running_server(data_dir) as started:
        yield started


@pytest.fixture
def task(live: LiveServer, key: str) -> str:
    """A task with two versions, the second active; a deleted one's name cannot be used again."""
    name = f"task-{next(_serials)}"
    assert live.upload(name, 0.1, key=key).status_code == 201
    assert live.upload(name, 0.2, key=key).status_code == 201
    return name


def test_the_document_has_every_operation() -> None:
    documented = {f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods}

    assert {operation.label for operation in OPERATIONS} == documented
    assert len(documented) > 15


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_answer_is_a_documented_one(
    live: LiveServer, key: str, task: str, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode
) -> None:
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Case, data: st.DataObject) -> None:
        if data.draw(st.booleans(), label="aims at what exists"):
            aim(case, task, data)
        case.call_and_validate(base_url=live.url, checks=CHECKS, headers={"authorization": f"Bearer {key}"})

    ask()


def aim(case: Case, task: str, data: st.DataObject) -> None:
    """Puts names of what exists, and bodies that are sound but for a field or two, where mere chance never comes to."""
    for name, value in (("task", task), ("model", task), ("version", data.draw(st.integers(1, 3)))):
        if name in case.path_parameters:
            case.path_parameters[name] = value
    if not isinstance(case.body, dict):
        return
    path = case.operation.path
    if path in GOOD_BODIES:
        case.body = GOOD_BODIES[path] | {"model": task} | _some(case.body, data)
        if path in STREAMING:
            case.body |= {"stream": data.draw(st.booleans())}
    elif path == "/v1/tasks/{task}/compare":
        case.body = {"versions": [1, 2], "inputs": [{"prompt": "x"}]} | _some(case.body, data)
    elif path == "/v1/tasks/{task}/versions":
        case.body = {"file": make_prompt_file(0.3), "config": make_prompt_config()} | _some(case.body, data)


def _some(fields: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    names = data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)) if fields else []
    return {name: fields[name] for name in names}
