"""From a file to a task that can be called, by OpenAI's client, unchanged."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.training.conftest import EXAMPLES, TrainingServer, to_lines, training_server


def test_a_file_becomes_a_task_that_can_be_called_at_once(server: TrainingServer) -> None:
    with server.client() as client:
        file = client.files.create(file=("mine.jsonl", to_lines(EXAMPLES)), purpose="fine-tune")
        held_out = client.files.create(file=("held-out.jsonl", to_lines(EXAMPLES[:4])), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=file.id,
            validation_file=held_out.id,
            suffix="yes-or-no",
            seed=11,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2.0}},
            },
            metadata={"who": "a test"},
            extra_body={"promptmux": {"num_virtual_tokens": 4}},
        )
        assert job.status in ("queued", "running")
        assert job.fine_tuned_model is None

        job = server.wait(job.id)

        assert (job.status, job.error) == ("succeeded", None)
        assert job.fine_tuned_model == "yes-or-no"
        assert job.finished_at is not None
        assert (job.seed, job.metadata) == (11, {"who": "a test"})
        assert job.method is not None
        assert job.method.supervised is not None
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.n_epochs == 3
        assert job.trained_tokens is not None
        assert job.trained_tokens > 0
        version = client.get("/tasks/yes-or-no/versions/1", cast_to=object)
        assert isinstance(version, dict)
        provenance = version["provenance"]
        assert provenance["training_run"] == job.id
        assert provenance["data_digest"].startswith("sha256:")
        assert version["metadata"]["training"]["seed"] == 11
        assert version["metadata"]["training"]["metrics"]["best_loss"] > 0
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
        steps = [event for event in events if event.type == "metrics"]
        assert {event.data["step"] for event in steps} == set(range(1, 10))  # type: ignore[index]
        assert any("valid_loss" in event.data for event in steps)  # type: ignore[operator]
        assert events[0].message == "New fine-tuned model created: yes-or-no"
        (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert checkpoint.fine_tuned_model_checkpoint == "yes-or-no@1"
        assert checkpoint.metrics.valid_loss == pytest.approx(
            version["metadata"]["training"]["metrics"]["best_loss"], abs=1e-5
        )
    assert server.say("yes-or-no") == server.say(checkpoint.fine_tuned_model_checkpoint)
    assert not list((server.app_runtime.settings.data_dir / "training").glob("ftjob-*"))


def test_training_lowers_the_loss(server: TrainingServer) -> None:
    job = server.wait(server.create(num_steps=40, learning_rate=0.3, task="learner").id)

    with server.client() as client:
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert losses[0] < losses[-1] - 0.5


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2", "p_tuning"])
def test_each_method_makes_a_prompt_that_the_server_takes(server: TrainingServer, method: str) -> None:
    job = server.wait(server.create(method=method, num_steps=2, task=method).id)

    assert job.error is None
    assert server.say(method) is not None


def test_the_same_seed_makes_the_same_prompt(server: TrainingServer) -> None:
    jobs = [server.wait(server.create(task=task, num_steps=4).id) for task in ("one", "other")]

    digests = {job.model_extra["promptmux"]["digest"] for job in jobs}  # type: ignore[index]
    assert len(digests) == 1


def test_a_version_that_is_not_activated_is_named_with_its_number(server: TrainingServer) -> None:
    server.wait(server.create(task="careful", num_steps=1).id)
    job = server.wait(server.create(task="careful", num_steps=2, activate=False).id)

    assert job.fine_tuned_model == "careful@2"
    with server.client() as client:
        task = client.get("/tasks/careful", cast_to=object)
    assert isinstance(task, dict)
    assert task["active_version"] == 1
    assert server.say("careful@2") is not None


def test_a_gate_asks_the_validation_file(server: TrainingServer) -> None:
    with server.client() as client:
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=server.upload(),
            validation_file=server.upload(EXAMPLES[:3]),
            suffix="gated",
            extra_body={"promptmux": {"num_steps": 2, "num_virtual_tokens": 2, "gate_threshold": 1.0}},
        )
        job = server.wait(job.id)
        version = client.get("/tasks/gated/versions/1", cast_to=object)
    assert isinstance(version, dict)
    assert job.fine_tuned_model == "gated@1"
    assert version["gate"]["threshold"] == 1.0
    assert version["gate"]["num_probes"] == 3


def test_jobs_are_listed_newest_first(server: TrainingServer) -> None:
    ids = [server.create(task="listed", num_steps=1).id for _ in range(3)]

    with server.client() as client:
        page = client.fine_tuning.jobs.list(limit=2)
        assert [job.id for job in page.data] == ids[:0:-1]
        assert page.has_next_page()
        listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert listed[:3] == ids[::-1]
    for job_id in ids:
        server.wait(job_id)


def test_messages_are_learnt_through_the_chat_template(server: TrainingServer) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(6)
    ]
    with server.client() as client:
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=server.upload(lines),
            suffix="chatty",
            extra_body={"promptmux": {"num_steps": 2, "num_virtual_tokens": 2}},
        )
        assert server.wait(job.id).error is None
        answer = client.chat.completions.create(
            model="chatty", messages=[{"role": "user", "content": "1?"}], max_tokens=2
        )
    assert answer.choices[0].message.content is not None


def test_labels_are_kept_for_classify(server: TrainingServer) -> None:
    lines = [{"text": f"{n}", "label": "odd" if n % 2 else "even"} for n in range(8)]
    with server.client() as client:
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=server.upload(lines),
            suffix="parity",
            extra_body={"promptmux": {"num_steps": 2, "num_virtual_tokens": 2, "init": "labels"}},
        )
        assert server.wait(job.id).error is None
        answer = client.post("/classify", body={"model": "parity", "input": "3"}, cast_to=object)
    assert isinstance(answer, dict)
    assert answer["data"][0]["label"] in ("odd", "even")


def test_examples_that_do_not_fit_the_context_fail_the_job_and_name_the_line(server: TrainingServer) -> None:
    lines = [*EXAMPLES, {"prompt": "x" * 100_000, "completion": "y"}]
    with server.client() as client:
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=server.upload(lines),
            suffix="long",
            extra_body={"promptmux": {"num_virtual_tokens": 2}},
        )
        job = server.wait(job.id)
        events = client.fine_tuning.jobs.list_events(job.id).data

    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "examples.jsonl:13" in job.error.message
    assert events[0].level == "error"


@pytest.mark.parametrize(
    ("examples", "options", "param"),
    [
        ([*EXAMPLES, {"prompt": "x" * 40, "completion": "y"}], {}, "training_file"),
        (EXAMPLES, {"method": "cartridge", "init_text": "a text of a book " * 4}, "promptmux.init_text"),
    ],
)
def test_no_row_is_longer_than_the_server_allows(
    model: Path, tmp_path: Path, examples: list[dict[str, Any]], options: dict[str, Any], param: str
) -> None:
    with training_server(model, tmp_path, max_training_tokens=32) as server, server.client() as client:
        job = client.fine_tuning.jobs.create(
            model=server.backbone,
            training_file=server.upload(examples),
            extra_body={"promptmux": {"num_virtual_tokens": 2, "num_steps": 1, **options}},
        )
        job = server.wait(job.id)

    assert job.status == "failed"
    assert job.error is not None
    assert job.error.param == param


def test_a_retired_name_is_refused_before_anything_is_trained(server: TrainingServer) -> None:
    server.wait(server.create(num_steps=1, task="retired").id)
    httpx.delete(f"{server.url}/v1/tasks/retired").raise_for_status()

    with pytest.raises(openai.ConflictError) as refused:
        server.create(num_steps=1, task="retired")

    assert refused.value.param == "promptmux.task"


def test_bad_lines_are_named_when_the_file_comes(server: TrainingServer) -> None:
    data = to_lines(EXAMPLES[:2]) + b'{"prompt": "a"}\nnot json\n'
    with server.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("bad.jsonl", data), purpose="fine-tune")

    body = json.loads(refused.value.response.text)["error"]
    assert (body["code"], body["param"]) == ("invalid_training_file", "file")
    assert "bad.jsonl:3: completion: is missing" in body["message"]
    assert "bad.jsonl:4" in body["message"]
