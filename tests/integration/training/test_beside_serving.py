"""Serving and training on one thread, over one model: neither changes what the other computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.training.conftest import TrainingServer, training_server

PROMPTS = [f"{'the text of a row ' * (n % 4)}{n}?" for n in range(12)]


@pytest.fixture(scope="module")
def busy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """A server of its own, whose every row is audited, with two tasks: vectors in front, and keys and values."""
    with training_server(model, tmp_path_factory.mktemp("busy"), audit_share=1.0, text_cache="off") as server:
        for task, method in (("front", "prompt_tuning"), ("layers", "p_tuning_v2")):
            assert server.wait(server.create(task=task, method=method, num_steps=3).id).error is None
        yield server


def ask(server: TrainingServer, client: openai.OpenAI, place: int) -> dict[str, Any]:
    model = (server.backbone, "front", "layers")[place % 3]
    answer = client.completions.create(
        model=model, prompt=PROMPTS[place % len(PROMPTS)], max_tokens=12, temperature=0, logprobs=1, seed=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.logprobs is not None
    return {"text": choice.text, "logprobs": choice.logprobs.token_logprobs}


def ask_all(server: TrainingServer, num_threads: int) -> list[dict[str, Any]]:
    with server.client() as client, ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(lambda place: ask(server, client, place), range(18)))


def test_rows_are_answered_during_training_as_without_it(busy: TrainingServer) -> None:
    alone = ask_all(busy, num_threads=1)
    before = busy.metric("background_seconds_total", beside_rows="yes")
    jobs = [
        busy.create(task=f"beside-{method}", method=method, num_steps=20_000)
        for method in ("prompt_tuning", "prefix_tuning")
    ]

    during = [ask_all(busy, num_threads) for num_threads in (1, 6)]

    with busy.client() as client:
        for job in jobs:
            assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
            client.fine_tuning.jobs.cancel(job.id)
    for answers in during:
        for found, expected in zip(answers, alone, strict=True):
            assert found["text"] == expected["text"]
            assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert busy.metric("background_seconds_total", beside_rows="yes") > before
    assert busy.metric("isolation_violations_total") == 0
    assert busy.metric("isolation_audits_total", result="match") > 0
    assert busy.metric("isolation_audits_total", result="mismatch") == 0
    assert busy.metric("isolation_audits_total", result="error") == 0


def test_a_prompt_is_the_same_whatever_is_served_and_trained_beside_it(busy: TrainingServer) -> None:
    options = {"method": "prompt_tuning", "num_steps": 10, "learning_rate": 0.3}
    quiet = busy.wait(busy.create(task="quiet", **options).id)

    other = busy.create(task="other", method="prefix_tuning", num_steps=20_000)
    job = busy.create(task="crowded", **options)
    with busy.client() as client:
        while client.fine_tuning.jobs.retrieve(job.id).status != "succeeded":
            ask_all(busy, num_threads=4)
        client.fine_tuning.jobs.cancel(other.id)
        crowded = client.fine_tuning.jobs.retrieve(job.id)

    assert quiet.model_extra is not None
    assert crowded.model_extra is not None
    assert crowded.model_extra["promptmux"]["digest"] == quiet.model_extra["promptmux"]["digest"]
