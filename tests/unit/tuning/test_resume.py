"""A run that is killed at any moment goes on, and ends with the very bits of one that was not."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.factories import make_tokenizer
from tuning.methods import save_peft_files
from tuning.records import RunStateError, TrainEvent, TrainTask
from tuning.run_state import STATE_FILE, TaskState, load_state, save_state
from tuning.trainer import Trainer

from .tiny import load_tiny, make_run, make_task

ROOT = Path(__file__).resolve().parents[3]


def make_tasks() -> list[TrainTask]:
    return [
        make_task("vectors", num_steps=30, num_validation=8, eval_every=2, patience=3, learning_rate=2.0),
        make_task("deep", "p_tuning_v2", num_steps=9, data_seed=1),
        make_task("encoder", "p_tuning", num_steps=16, data_seed=2, num_validation=4, eval_every=4, patience=1),
        make_task("adafactor", "prefix_tuning", num_steps=12, data_seed=3, optimizer="adafactor"),
        make_task("text", "cartridge", num_steps=8, data_seed=4),
    ]


def make_trainer(model: PreTrainedModel, folder: Path, kill_at: int | None = None) -> Trainer:
    """With `kill_at`, the process kills itself at the so-manieth event."""
    num_events = 0

    def count(event: TrainEvent) -> None:
        nonlocal num_events
        num_events += 1
        if num_events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    run = make_run(max_tasks_at_once=3, checkpoint_every=4, max_tokens_per_pass=100)
    return Trainer(model, make_tokenizer(), make_tasks(), run=run, folder=folder, listener=count)


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def results_of(trainer: Trainer) -> dict[str, tuple[object, ...]]:
    return {
        name: (prompt.history, prompt.best_step, prompt.best_loss, prompt.num_steps, prompt.num_examples)
        for name, prompt in trainer.results.items()
    }


def assert_same_files(found: Path, expected: Path, names: Sequence[str]) -> None:
    for name in names:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (found / name / file).read_bytes() == (expected / name / file).read_bytes(), name


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    undisturbed = make_trainer(model, tmp_path / "undisturbed")
    undisturbed.run()
    program = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(int(sys.argv[4]));"
        "from tests.unit.tuning.test_resume import load, make_trainer;"
        "make_trainer(load(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])).run()"
    )
    # In the middle of a step's events, first before any task has ended, then long after.
    for kill_at in (17, 31):
        command = [sys.executable, "-c", program, str(tmp_path / "llama"), str(tmp_path / "killed"), str(kill_at)]
        # As many threads as here: sums are divided among them.
        done = subprocess.run([*command, str(torch.get_num_threads())], cwd=ROOT, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    final = make_trainer(model, tmp_path / "killed")
    assert not final.is_done
    final.run()
    assert results_of(final) == results_of(undisturbed)
    assert_same_files(tmp_path / "killed", tmp_path / "undisturbed", [task.name for task in make_tasks()])


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 18])
def test_a_run_that_was_saved_after_any_step_goes_on_the_same(tmp_path: Path, num_steps: int) -> None:
    model = load_tiny("llama", tmp_path)
    undisturbed = make_trainer(model, tmp_path / "undisturbed")
    undisturbed.run()
    first = make_trainer(model, tmp_path / "saved")
    for _ in range(num_steps):
        first.step()
    first.save()
    second = make_trainer(model, tmp_path / "saved")
    second.run()
    assert results_of(second) == results_of(undisturbed)
    assert_same_files(tmp_path / "saved", tmp_path / "undisturbed", [task.name for task in make_tasks()])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    first = make_trainer(model, tmp_path / "run")
    first.run()
    again = make_trainer(model, tmp_path / "run", kill_at=1)
    assert again.is_done
    assert not again.step()
    assert results_of(again) == results_of(first)


def test_state_of_another_training_is_refused(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    trainer = Trainer(model, make_tokenizer(), [make_task("a")], run=make_run(), folder=tmp_path / "run")
    trainer.step()
    trainer.save()
    for changed in (make_task("a", seed=1), make_task("a", data_seed=1), make_task("a", num_steps=7)):
        with pytest.raises(RunStateError, match="another training of a"):
            Trainer(model, make_tokenizer(), [changed], run=make_run(), folder=tmp_path / "run")


@pytest.mark.parametrize("contents", [b"", b"\x10\0\0\0\0\0\0\0not a header at", b"{}"])
def test_a_damaged_state_is_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(contents)
    with pytest.raises(RunStateError, match="is no state of a run"):
        load_state(tmp_path)


def test_another_safetensors_file_is_no_state(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / STATE_FILE)
    with pytest.raises(RunStateError, match="is no state of a run"):
        load_state(tmp_path)


def test_what_a_killed_writer_left_is_no_state_and_is_swept(tmp_path: Path) -> None:
    save_state(tmp_path, {})
    leftover = tmp_path / f".{STATE_FILE}.123"
    leftover.write_bytes(b"half")
    assert load_state(tmp_path) == {}
    assert not leftover.exists()


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny("llama", tmp_path)
    trainer = Trainer(model, make_tokenizer(), [make_task("a")], run=make_run(), folder=tmp_path / "run")
    trainer.step()
    trainer.save()
    before = (tmp_path / "run" / STATE_FILE).read_bytes()
    trainer.step()

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuning.run_state.sync", fail)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STATE_FILE]


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path, {"a": TaskState({"t": torch.zeros(10_000)})})
        with pytest.raises(OSError, match="File too large"):
            save_peft_files(tmp_path / "a", config, {"prompt_embeddings": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert list((tmp_path / "a").iterdir()) == []


def test_a_cancelled_task_is_not_gone_on_with(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    trainer = Trainer(model, make_tokenizer(), [make_task("a"), make_task("b")], run=make_run(), folder=tmp_path / "r")
    trainer.step()
    trainer.save()
    trainer.cancel("a")
    trainer.step()
    assert {*load_state(tmp_path / "r")} == {"b"}
