"""The command that makes the demo folder, end to end on a tiny backbone."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from tuning.demo import make as demo
from tuning.demo.card import read_card, render_readme
from tuning.demo.data import Example, build_dataset

from .conftest import make_spec


@pytest.fixture
def backbone_folder(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [
        make_spec("prompt_tuning", name="vowel-embedding", num_steps=3, showcase=("axu",)),
        make_spec("prefix_tuning", name="vowel-prefix", num_steps=3),
    ]
    monkeypatch.setattr(demo, "TASKS", {spec.name: spec for spec in specs})


def run(command: str, backbone_folder: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(demo.app, [command, "--backbone", str(backbone_folder), "--out", str(out), *more])


def test_train_writes_each_prompt_its_card_and_the_table(backbone_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("train", backbone_folder, out, "--base-model-name", "tiny")
    assert result.exit_code == 0, result.output
    for name, dtype in (("vowel-embedding", "F32"), ("vowel-prefix", "F16")):
        with safe_open(out / name / "adapter_model.safetensors", framework="numpy") as file:
            assert file.get_slice("prompt_embeddings").get_dtype() == dtype
        assert json.loads((out / name / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
        assert (out / name / "adapter_model.safetensors").stat().st_mode & 0o077 == 0o044
        assert read_card(out / name / "card.json").num_steps == 3
    cards = [read_card(path) for path in sorted(out.glob("*/card.json"))]
    # The item picked by hand may be anywhere among the shown ones, but it is there, with its right answer.
    assert {"axu ->": "v"}.items() <= {item.prompt: item.target for item in cards[0].examples}.items()
    assert (out / "README.md").read_text() == render_readme(out, cards)
    assert "| vowel-prefix |" in (out / "README.md").read_text()


def test_evaluate_finds_the_figures_of_the_saved_files_again(backbone_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert run("train", backbone_folder, out, "--task", "vowel-prefix").exit_code == 0
    trained = read_card(out / "vowel-prefix" / "card.json")
    (out / "README.md").unlink()
    result = run("evaluate", backbone_folder, out, "--task", "vowel-prefix")
    assert result.exit_code == 0, result.output
    assert read_card(out / "vowel-prefix" / "card.json") == trained
    assert (out / "README.md").is_file()


def test_evaluate_refuses_items_that_the_prompt_may_have_been_trained_on(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    assert run("train", backbone_folder, out, "--task", "vowel-prefix").exit_code == 0
    other = make_spec("prefix_tuning", name="vowel-prefix", examples=lambda: [Example(f"a{i}", "v") for i in range(20)])
    monkeypatch.setattr(demo, "TASKS", {"vowel-prefix": other})
    result = run("evaluate", backbone_folder, out)
    assert result.exit_code == 2
    assert "gives other items" in result.output


def test_unknown_or_untrained_task_is_refused(backbone_folder: Path, tmp_path: Path) -> None:
    result = run("train", backbone_folder, tmp_path / "demo", "--task", "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.output
    result = run("evaluate", backbone_folder, tmp_path / "demo", "--task", "vowel-prefix")
    assert result.exit_code == 2
    assert "train it first" in result.output


def test_prefix_of_the_demo_starts_from_worked_items_and_is_trained_as_it_is(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    spec = make_spec("prefix_tuning", name="vowel-prefix")
    dataset = build_dataset(spec, seed=0)
    task = demo.train_task(spec, dataset, tokenizer, seed=0)
    assert (task.config.method, task.config.init, task.config.num_virtual_tokens) == ("p_tuning_v2", "text", spec.k)
    assert task.config.init_text is not None
    first, *_ = task.config.init_text.splitlines()
    assert first in {f"{spec.prompt_text(item)}{spec.completion_text(item)}" for item in dataset.train}
    assert len(tokenizer(task.config.init_text)["input_ids"]) >= spec.k
    assert len(task.train) == len(dataset.train)
