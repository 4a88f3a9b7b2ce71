"""What a change in the store means for the engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.manifest import SoftPrompt
from prompt_store.store import PromptStore
from server.engine.request import PromptRef
from server.metrics import Metrics
from server.runtime.stats import TaskStatsTable
from server.runtime.tasks import PromptUpload, TaskService, resident_key
from server.tenancy.keys import LOCAL_CALLER
from tests.fakes import EchoBackbone, EchoEngine, make_prompt_config, make_prompt_file

TENANT = LOCAL_CALLER.tenant


@pytest.fixture
def engine() -> EchoEngine:
    def load_prompt(ref: PromptRef) -> SoftPrompt:
        raise AssertionError(f"{ref.task} was read")

    return EchoEngine(max_waiting_rows=1, load_prompt=load_prompt)


@pytest.fixture
def tasks(tmp_path: Path, engine: EchoEngine) -> Iterator[TaskService]:
    with PromptStore.open(tmp_path / "store", backbone=EchoBackbone().shape(64)) as store:
        yield TaskService(store, engine, TaskStatsTable(), Metrics(), "tiny/echo")


def upload(tasks: TaskService, task: str, value: float) -> str:
    """Returns what the engine files the version's prefix under."""
    file = PromptUpload(task=task, file=make_prompt_file(value), config=make_prompt_config())
    view, _ = tasks.upload(LOCAL_CALLER, file)
    return resident_key(view.version)


def test_file_is_evicted_with_the_last_version_that_has_it(tasks: TaskService, engine: EchoEngine) -> None:
    key = upload(tasks, "one", 0.1)
    assert upload(tasks, "two", 0.1) == upload(tasks, "three", 0.1) == key
    assert upload(tasks, "two", 0.2) != key
    tasks.delete_version(LOCAL_CALLER, "two", 1)
    tasks.delete_task(LOCAL_CALLER, "one")
    assert engine.evicted == [], "the third task answers with it"
    tasks.delete_task(LOCAL_CALLER, "three")
    assert engine.evicted == [key]


def test_all_versions_of_a_deleted_task_are_evicted(tasks: TaskService, engine: EchoEngine) -> None:
    keys = {upload(tasks, "one", value) for value in (0.1, 0.2, 0.3)}
    tasks.delete_task(LOCAL_CALLER, "one")
    assert set(engine.evicted) == keys
    assert len(engine.evicted) == 3


def pin(tasks: TaskService, task: str) -> None:
    tasks.update_task(LOCAL_CALLER, task, active_version=None, expected_version=None, pinned=True)


def test_upload_to_a_pinned_task_pins_what_is_active_then(tasks: TaskService, engine: EchoEngine) -> None:
    upload(tasks, "pinned", 0.1)
    pin(tasks, "pinned")
    assert [ref.version for ref in engine.pinned] == [1]
    upload(tasks, "pinned", 0.2)
    assert [ref.version for ref in engine.pinned] == [2]


def test_upload_to_another_task_does_not_read_all_pins_again(tasks: TaskService, engine: EchoEngine) -> None:
    upload(tasks, "pinned", 0.1)
    pin(tasks, "pinned")
    engine.pinned = ()
    upload(tasks, "other", 0.1)
    assert engine.pinned == ()
    # The same bytes again may have repaired a file that the engine could not load.
    upload(tasks, "pinned", 0.1)
    assert [ref.version for ref in engine.pinned] == [1]
