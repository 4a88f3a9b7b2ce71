"""Training on the engine's thread: what is done so that no job takes the memory, or the thread, for itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.runtime.training_work import EXAMPLES_A_BOUNDARY, TrainingRun, TrainingWork
from tests.integration.clients.tiny_server import make_byte_tokenizer
from tuning.config import RunConfig, TrainConfig
from tuning.examples import EncodedExample
from tuning.records import TrainedPrompt, TrainTask
from tuning.trainer import Trainer

MAX_TOKENS = 32


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=263, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_work(model: LlamaForCausalLM) -> TrainingWork:
    config = RunConfig(max_tokens_per_pass=MAX_TOKENS, max_tasks_at_once=1)
    return TrainingWork(model, make_byte_tokenizer(), config, model_name="tiny")


def make_run(folder: Path, ended: list[Any], *, num_tokens: int = 4, num_examples: int = 3) -> TrainingRun:
    example = EncodedExample(tuple(range(num_tokens - 2)), (5, 6))
    task = TrainTask(
        name="t", config=TrainConfig(num_steps=1, num_virtual_tokens=2), train=(example,) * num_examples, validation=()
    )
    return TrainingRun(job_id="j", task=task, folder=folder, on_event=lambda event: None, on_end=ended.append)


@pytest.mark.parametrize(("num_tokens", "is_checkpointed"), [(MAX_TOKENS - 2, False), (MAX_TOKENS - 1, True)])
def test_of_a_row_longer_than_a_pass_not_every_activation_is_kept(
    model: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    is_checkpointed: bool,
) -> None:
    chosen: list[bool] = []
    make = Trainer.__init__

    def watched(self: Trainer, *args: Any, run: RunConfig, **kwargs: Any) -> None:
        chosen.append(run.activation_checkpointing)
        make(self, *args, run=run, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", watched)
    ended: list[Any] = []
    work = make_work(model)
    work.add(make_run(tmp_path, ended, num_tokens=num_tokens))
    while work.run(lambda: None):
        pass

    assert chosen == [is_checkpointed]
    assert isinstance(ended[0], TrainedPrompt)


def test_rows_do_not_wait_until_a_large_file_is_looked_through(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_boundaries = 0

    def give_way() -> None:
        nonlocal num_boundaries
        num_boundaries += 1

    monkeypatch.setattr(Trainer, "step", lambda self: False)
    ended: list[Any] = []
    work = make_work(model)
    work.run(lambda: None)  # the look at the backbone
    work.add(make_run(tmp_path, ended, num_examples=10 * EXAMPLES_A_BOUNDARY))
    work.run(give_way)

    assert num_boundaries >= 10
    assert isinstance(ended[0], Exception)
