"""From examples to folders: what is written is whole, says how it was made, and is what was measured."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.factories import load_model, make_tokenizer, save_tiny_backbone
from tuning import run as run_module
from tuning.config import RunConfig, TrainConfig
from tuning.plans import PreparedTask, TaskPlan, prepare_task
from tuning.prefixes import PrefixError
from tuning.provenance import same_training, training_run, upload_metadata, write_held_out
from tuning.records import HistoryPoint, RunStateError, TrainEvent, TrainTaskError
from tuning.run import STATE_FOLDER, FinishedTask, RunError, TrainingBackbone, run_tasks
from tuning.splits import DataFiles
from tuning.task_run import TaskRun

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "training.json",
    "metrics.jsonl",
    "held_out.jsonl",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = save_tiny_backbone("llama", tmp_path_factory.mktemp("tiny") / "llama")
    return load_model(folder).requires_grad_(False)


@pytest.fixture
def backbone(model: PreTrainedModel) -> TrainingBackbone:
    return TrainingBackbone(model, make_tokenizer(), "tiny-llama")


@pytest.fixture
def tasks(tmp_path: Path) -> list[PreparedTask]:
    return [make_task(tmp_path, "vectors"), make_task(tmp_path, "layers", method="p_tuning_v2", init="random")]


def make_task(folder: Path, name: str, *, test_share: float = 0.1, **config: Any) -> PreparedTask:
    path = folder / "words.jsonl"
    words = [first + second + third for first in "abcde" for second in "xyz" for third in "uvw"]
    rows = [{"text": word, "label": "v" if word[0] in "ae" else "c"} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields: dict[str, Any] = {"num_virtual_tokens": 4, "num_steps": 6, "batch_size": 4} | config
    files = DataFiles(train=path, test_share=test_share)
    return prepare_task(TaskPlan(name=name, files=files, config=TrainConfig(**fields)), make_tokenizer())


def train(backbone: TrainingBackbone, tasks: list[PreparedTask], out: Path, **options: Any) -> list[FinishedTask]:
    return run_tasks(backbone, tasks, run=RunConfig(checkpoint_every=2), out=out, **options)


def test_finished_folder_is_whole_and_tells_how_it_was_made(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    events: list[TrainEvent] = []
    measured: list[tuple[str, int, int]] = []
    vectors, layers = train(
        backbone,
        tasks,
        out,
        cautions={"vectors": ["few_virtual_tokens: said before", "mine: of the data"]},
        listener=events.append,
        on_measuring=lambda *done: measured.append(done),
    )

    assert {path.name for path in out.iterdir()} == {"vectors", "layers"}
    assert vectors.folder == out / "vectors"
    for one in (vectors, layers):
        assert one.folder is not None
        assert {path.name for path in one.folder.iterdir()} == FILES
        assert one.folder.stat().st_mode & 0o777 == 0o755
        assert json.loads((one.folder / "training.json").read_text()) == one.record
    record: Any = vectors.record
    assert record["warnings"][:2] == ["few_virtual_tokens: said before", "mine: of the data"]
    assert [text.partition(":")[0] for text in record["warnings"]].count("few_virtual_tokens") == 1
    assert (
        record["data"] | {"num_train": 35, "num_validation": 5, "num_test": 5, "labels": ["c", "v"]} == record["data"]
    )
    assert record["data"]["digest"] == tasks[0].data.digest
    assert (record["method"], record["config"]["init"], record["config"]["seed"]) == ("prompt_tuning", "vocab", 0)
    assert record["file_digest"] == hashlib.sha256((out / "vectors/adapter_model.safetensors").read_bytes()).hexdigest()
    assert json.loads((out / "vectors/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert {event.kind for event in events} >= {"started", "step", "evaluated", "finished"}
    assert measured[-1] == ("layers", 10, 10)
    lines = [json.loads(line) for line in (out / "vectors/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [(line["of"], line["examples"]) for line in lines[6:]] == [("prompt", "test"), ("without_prompt", "test")]
    assert len((out / "vectors/held_out.jsonl").read_text().splitlines()) == 5


def test_figures_are_those_of_the_saved_files_in_peft(
    backbone: TrainingBackbone, tasks: list[PreparedTask], model: PreTrainedModel, tmp_path: Path
) -> None:
    for one, prepared in zip(train(backbone, tasks, tmp_path / "out"), tasks, strict=True):
        record: Any = one.record
        loaded: Any = PeftModel.from_pretrained(model, str(one.folder)).eval()
        total, count = 0.0, 0
        for example in prepared.held_out_encoded:
            ids = example.prompt_ids + example.completion_ids
            with torch.no_grad():
                logits = loaded(input_ids=torch.tensor([ids])).logits[0, -len(example.completion_ids) - 1 : -1]
            targets = torch.tensor(example.completion_ids)
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
        assert record["evaluation"]["prompt"]["loss"] == pytest.approx(total / count, abs=1e-4)
        assert record["evaluation"]["prompt"]["loss"] < record["evaluation"]["without_prompt"]["loss"]


def test_what_is_there_already_is_not_written_over(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(backbone, tasks[:1], out)
    with pytest.raises(RunError, match=r"out/vectors exists; remove it, or write elsewhere"):
        train(backbone, tasks, out)
    (out / STATE_FOLDER).mkdir()
    with pytest.raises(RunError, match=r"holds a run that was not finished; go on with it \(--resume\)"):
        train(backbone, tasks, out)
    with pytest.raises(RunError, match="holds something else than this run's prompt"):
        train(backbone, [make_task(tmp_path, "vectors", seed=3)], out, resumes=True)


class Killed(BaseException):
    pass


def test_run_that_was_cut_off_anywhere_ends_like_one_that_was_not(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(backbone, tasks, tmp_path / "whole")
    out = tmp_path / "cut"

    def cut_off_at(step: int) -> Any:
        def listen(event: TrainEvent) -> None:
            if event.kind == "step" and event.step == step:
                raise Killed

        return listen

    def cut_off_while_writing(*arguments: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(backbone, tasks, out, listener=cut_off_at(5))
    assert {path.name for path in out.iterdir()} == {STATE_FOLDER}
    with monkeypatch.context() as patched:
        # Between one finished folder and the next.
        calls: Iterator[Any] = iter([run_module.write_metrics, cut_off_while_writing])
        patched.setattr(run_module, "write_metrics", lambda *arguments: next(calls)(*arguments))
        with pytest.raises(Killed):
            train(backbone, tasks, out, resumes=True)
    assert {path.name for path in out.iterdir()} == {STATE_FOLDER, "vectors"}
    steps: list[TrainEvent] = []
    resumed = train(backbone, tasks, out, resumes=True, listener=steps.append)

    assert steps == []
    assert {path.name for path in out.iterdir()} == {"vectors", "layers"}
    for one, other in zip(whole, resumed, strict=True):
        assert one.record is not None
        assert other.record is not None
        assert one.record["file_digest"] == other.record["file_digest"]
        assert one.record["curve"] == other.record["curve"]
        assert one.record["evaluation"] == other.record["evaluation"]


def test_task_that_fails_leaves_no_folder_and_the_others_alone(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = TaskRun.update

    def spoil(run: TaskRun, loss: float) -> HistoryPoint:
        return update(run, math.nan if run.name == "vectors" and run.step == 3 else loss)

    monkeypatch.setattr(TaskRun, "update", spoil)
    vectors, layers = train(backbone, tasks, tmp_path / "out")

    assert (vectors.folder, vectors.record) == (None, None)
    assert "finite" in str(vectors.failure)
    assert layers.folder is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layers"}


def test_prompt_that_cannot_be_read_back_fails_alone(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = run_module.load_prefix

    def refuse(folder: Path, *arguments: Any, **options: Any) -> Any:
        if ".vectors." in folder.name:
            raise PrefixError("it is not finite in the serving dtype")
        return load(folder, *arguments, **options)

    monkeypatch.setattr(run_module, "load_prefix", refuse)
    vectors, layers = train(backbone, tasks, tmp_path / "out")

    assert vectors.failure == "the prompt that was trained cannot be served: it is not finite in the serving dtype"
    assert layers.folder is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layers"}


def test_nothing_half_done_lies_beside_the_finished_folders(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen: list[set[str]] = []
    train(backbone, tasks, out, on_measuring=lambda *done: seen.append({path.name for path in out.iterdir()}))
    assert seen[0] == {STATE_FOLDER}
    assert seen[-1] == {STATE_FOLDER, "vectors"}


def test_one_process_at_a_time_trains_into_a_folder(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def try_too(event: TrainEvent) -> None:
        if event.kind == "started":
            with pytest.raises(RunError) as caught:
                train(backbone, tasks, out, resumes=len(refused) > 0)
            refused.append(str(caught.value))

    train(backbone, tasks, out, listener=try_too)
    assert refused == [f"another process trains into {out}; wait for it, or write elsewhere (--out)"] * 2


def test_resume_without_some_of_the_tasks_would_lose_them_and_is_refused(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def cut_off(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(backbone, tasks, out, listener=cut_off)
    with pytest.raises(RunError, match="holds an unfinished run of vectors too; give all its tasks"):
        train(backbone, tasks[1:], out, resumes=True)
    other = TrainingBackbone(backbone.model, backbone.tokenizer, "another-llama")
    with pytest.raises(RunStateError, match="its data or the backbone was changed"):
        train(other, tasks, out, resumes=True)
    assert all(one.folder is not None for one in train(backbone, tasks, out, resumes=True))
    with pytest.raises(RunError, match="holds something else than this run's prompt"):
        train(other, tasks, out, resumes=True)


def test_a_task_may_be_called_like_a_file_of_the_runs_own(backbone: TrainingBackbone, tmp_path: Path) -> None:
    tasks = [make_task(tmp_path, name) for name in ("run_state.safetensors", "lock")]
    assert all(one.folder is not None for one in train(backbone, tasks, tmp_path / "out"))


def test_run_that_is_refused_leaves_nothing_behind(backbone: TrainingBackbone, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainTaskError, match="init_text: a cartridge is made of a text"):
        train(backbone, [make_task(tmp_path, "document", method="cartridge")], out)
    assert list(out.iterdir()) == []


def test_without_held_out_examples_nothing_is_claimed(backbone: TrainingBackbone, tmp_path: Path) -> None:
    prepared = make_task(tmp_path, "vectors", test_share=0.0)
    bare = PreparedTask(
        plan=prepared.plan,
        data=prepared.data,
        task=prepared.task,
        held_out_part="test",
        held_out=(),
        held_out_encoded=(),
    )
    (finished,) = train(backbone, [bare], tmp_path / "out")
    record: Any = finished.record
    assert record["evaluation"] is None
    assert (tmp_path / "out/vectors/held_out.jsonl").read_text() == ""
    assert "evaluation" not in upload_metadata(record)["training"]


def test_curves_are_drawn_where_they_are_wanted(backbone: TrainingBackbone, tmp_path: Path) -> None:
    train(backbone, [make_task(tmp_path, "vectors")], tmp_path / "out", plots=True)
    assert (tmp_path / "out/vectors/curves.png").read_bytes().startswith(b"\x89PNG")


def test_record_tells_which_training_it_is_of(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    finished = train(backbone, tasks, tmp_path / "out")
    record: Any = finished[0].record
    facts = backbone.facts()
    assert same_training(record, tasks[0], facts)
    assert not same_training(record, tasks[1], facts)
    assert not same_training(record, make_task(tmp_path, "vectors", seed=1), facts)
    assert not same_training(record, tasks[0], facts | {"dtype": "bfloat16"})
    assert training_run(record) == training_run(json.loads(json.dumps(record)))
    assert training_run(record).startswith("vectors-prompt_tuning-seed0-")
    other = json.loads(json.dumps(record))
    other["config"]["num_steps"] = 7
    assert training_run(other) != training_run(record)


def test_metadata_of_an_upload_fit_what_a_server_takes(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    record: Any = train(backbone, tasks, tmp_path / "out")[0].record
    metadata = upload_metadata(record)
    assert metadata["labels"] == ["c", "v"]
    training = metadata["training"]
    assert (training["method"], training["seed"], training["num_steps"]) == ("prompt_tuning", 0, 6)
    assert training["evaluation"]["prompt"] == record["evaluation"]["prompt"]
    assert training["curve"] == record["curve"]
    record["curve"] = record["curve"] * 100
    assert "curve" not in upload_metadata(record)["training"]
    record["data"]["labels"] = [str(n) for n in range(129)]
    assert "labels" not in upload_metadata(record)


def test_labels_too_long_for_an_upload_are_left_out(
    backbone: TrainingBackbone, tasks: list[PreparedTask], tmp_path: Path
) -> None:
    from prompt_store.manifest import StoreLimits

    record: Any = train(backbone, tasks, tmp_path / "out")[0].record
    record["data"]["labels"] = ["ü" * 199 + str(n) for n in range(9)] * 10
    metadata = upload_metadata(record)
    assert "labels" not in metadata
    assert metadata["training"]["curve"] == record["curve"]
    assert len(json.dumps(metadata)) <= StoreLimits().max_metadata_bytes


def test_held_out_examples_are_written_as_probes(tmp_path: Path) -> None:
    from prompt_store.manifest import StoreLimits
    from prompt_store.probes import read_probes
    from tuning.examples import EncodedExample, Example

    examples = [Example(f"p{n}", " ü", label="x") for n in range(1200)] + [Example("long", "y" * 40_000)]
    examples.insert(3, Example("y" * 40_000, " z"))
    path = tmp_path / "held_out.jsonl"

    def write(examples: list[Example], *, truncated: int | None = None) -> int:
        encoded = [EncodedExample((9,), (8, 2), is_truncated=place == truncated) for place in range(len(examples))]
        return write_held_out(path, examples, encoded, make_tokenizer())

    assert write(examples) == 999
    probes = read_probes(path.read_bytes(), StoreLimits())
    assert [(p.prompt, p.completion) for p in probes[:3]] == [("p0", " ü"), ("p1", " ü"), ("p2", " ü")]
    large = [Example("y" * 30_000, " z")] * 100
    write(large)
    assert len(read_probes(path.read_bytes(), StoreLimits())) == 34
    # A server would refuse it.
    write(examples[:2], truncated=0)
    assert [p.prompt for p in read_probes(path.read_bytes(), StoreLimits())] == ["p1"]
