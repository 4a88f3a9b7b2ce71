"""A job that is cancelled stays so; one that is interrupted comes to the very prompt that it would have come to."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from server.runtime.training_jobs import CHECKPOINT_EVERY, JobRunner
from tests.integration.training.conftest import TrainingServer, training_server, wait_until
from tests.unit.cli.processes import ROOT, wait_for_address

NUM_STEPS = 150


def steps_told(server: TrainingServer, job_id: str) -> int:
    with server.client() as client:
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    return max((event.data["step"] for event in events if event.type == "metrics"), default=0)  # type: ignore[index]


def wait_for_step(server: TrainingServer, job_id: str, step: int) -> None:
    wait_until(lambda: True if steps_told(server, job_id) >= step else None)


@pytest.fixture(scope="module")
def digest(server: TrainingServer) -> str:
    """Of the prompt that nothing interrupts."""
    job = server.wait(server.create(num_steps=NUM_STEPS, task="uninterrupted").id)
    found: str = job.model_extra["promptmux"]["digest"]  # type: ignore[index]
    return found


def test_a_cancelled_job_makes_nothing_and_stays_cancelled(server: TrainingServer) -> None:
    job = server.create(num_steps=20_000, task="cancelled")
    wait_for_step(server, job.id, 1)

    with server.client() as client:
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        # The next job is not held up by it.
        assert server.wait(server.create(num_steps=1, task="next").id).status == "succeeded"
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert (found.status, found.fine_tuned_model) == ("cancelled", None)
        with pytest.raises(openai.NotFoundError):
            client.get("/tasks/cancelled", cast_to=object)
        events = client.fine_tuning.jobs.list_events(job.id, limit=5).data
    assert events[0].message == "The job was cancelled."
    wait_until(lambda: None if list((server.app_runtime.settings.data_dir / "training").glob("ftjob-*")) else True)


def test_a_job_that_has_ended_cannot_be_cancelled(server: TrainingServer) -> None:
    job = server.wait(server.create(num_steps=1, task="ended").id)

    with server.client() as client, pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_restart_goes_on_where_the_server_stopped(model: Path, tmp_path: Path, digest: str) -> None:
    with training_server(model, tmp_path) as first:
        job = first.create(num_steps=NUM_STEPS, task="restarted")
        wait_for_step(first, job.id, 30)
    with training_server(model, tmp_path) as second:
        told = steps_told(second, job.id)
        ended = second.wait(job.id)
        with second.client() as client:
            events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))

    assert told < NUM_STEPS
    assert ended.model_extra is not None
    assert ended.model_extra["promptmux"]["digest"] == digest
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert sorted(steps) == sorted(set(steps)), "a drain loses no step"
    assert any(event.message.startswith("Training goes on") for event in events)


def test_a_killed_server_goes_on_where_it_last_saved(model: Path, tmp_path: Path, digest: str) -> None:
    program = "from server.cli import main; main()"
    arguments = ["serve", str(model), "--port", "0", "--dtype", "float32", "--device", "cpu", "--compile", "off"]
    arguments += ["--data-dir", str(tmp_path), "--max-virtual-tokens", "16", "--allow-training"]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        doomed = TrainingServer(wait_for_address(process), model.name)
        job = doomed.create(num_steps=NUM_STEPS, task="killed")
        wait_for_step(doomed, job.id, CHECKPOINT_EVERY)
    finally:
        process.kill()
        process.communicate()
    with training_server(model, tmp_path) as second:
        ended = second.wait(job.id)
        with second.client() as client:
            events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))

    assert ended.status == "succeeded"
    assert ended.model_extra is not None
    assert ended.model_extra["promptmux"]["digest"] == digest
    resumed = next(i for i, event in enumerate(events) if event.message.startswith("Training goes on"))
    later = [event.data["step"] for event in events[:resumed] if event.type == "metrics"]  # type: ignore[index]
    assert min(later) > 1, "it did not begin anew"


def test_a_job_of_another_backbone_fails_and_says_so(model: Path, tmp_path: Path) -> None:
    with training_server(model, tmp_path / "data") as server:
        job = server.create(num_steps=20_000)
        wait_for_step(server, job.id, 1)
    other = tmp_path / "other"
    shutil.copytree(model, other)

    with training_server(other, tmp_path / "data") as server:
        ended = server.wait(job.id)

    assert (ended.status, ended.fine_tuned_model) == ("failed", None)
    assert ended.error is not None
    assert ended.error.param == "model"
    assert "other" in ended.error.message


def test_a_job_waits_for_a_server_that_makes_prompts(model: Path, tmp_path: Path) -> None:
    with training_server(model, tmp_path) as server:
        job = server.create(num_steps=300)
        wait_for_step(server, job.id, 1)
    with (
        training_server(model, tmp_path, allow_training="off") as server,
        server.client() as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.fine_tuning.jobs.retrieve(job.id)
    with training_server(model, tmp_path) as server:
        assert server.wait(job.id).status == "succeeded"


def test_a_job_is_not_cancelled_while_its_prompt_is_stored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_storing, may_go_on = threading.Event(), threading.Event()
    upload = JobRunner._upload

    def upload_slowly(*args: Any) -> dict[str, Any]:
        is_storing.set()
        assert may_go_on.wait(30)
        return upload(*args)

    monkeypatch.setattr(JobRunner, "_upload", upload_slowly)
    with training_server(model, tmp_path) as server, server.client() as client:
        job = server.create(num_steps=1)
        assert is_storing.wait(30)
        with pytest.raises(openai.ConflictError):
            client.fine_tuning.jobs.cancel(job.id)
        may_go_on.set()
        assert server.wait(job.id).status == "succeeded"
