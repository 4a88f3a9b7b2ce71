"""Demo prompts in a real store: what is added, what is left alone, and what must not keep a server from starting."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.store import PromptStore
from server.runtime.demo import load_demo_prompts
from tests.fakes import EchoBackbone, make_prompt_config, make_prompt_file


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with PromptStore.open(tmp_path / "data") as opened:
        opened.use_backbone(EchoBackbone().shape(64))
        yield opened


def add(folder: Path, task: str, card: str | None, *, value: float, file: bytes | None = None) -> None:
    directory = folder / task
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(file if file is not None else make_prompt_file(value))
    (directory / "adapter_config.json").write_bytes(make_prompt_config())
    if card is not None:
        (directory / "card.json").write_text(card, encoding="utf-8")


def test_labels_of_a_card_become_those_of_the_version(tmp_path: Path, store: PromptStore) -> None:
    add(tmp_path / "demo", "mood", json.dumps({"labels": ["good", "bad"], "seed": 3}), value=0.1)
    add(tmp_path / "demo", "capital", json.dumps({"labels": None}), value=0.2)
    add(tmp_path / "demo", "bare", None, value=0.3)

    assert load_demo_prompts(store, tmp_path / "demo") == ["bare", "capital", "mood"]

    found = {task: store.resolve("anyone", task) for task in ("bare", "capital", "mood")}
    assert dict(found["mood"].metadata) == {"labels": ["good", "bad"]}
    assert not found["capital"].metadata
    assert not found["bare"].metadata
    assert {version.tenant for version in found.values()} == {"shared"}


def test_what_is_there_already_or_was_deleted_is_left_alone(tmp_path: Path, store: PromptStore) -> None:
    add(tmp_path / "demo", "mood", None, value=0.1)
    add(tmp_path / "demo", "gone", None, value=0.2)
    load_demo_prompts(store, tmp_path / "demo")
    store.delete_task("shared", "gone", actor="")

    assert load_demo_prompts(store, tmp_path / "demo") == []


@pytest.mark.parametrize(("card", "file"), [("[1]", None), ("{", None), (None, b"no prompt")])
def test_one_broken_demo_keeps_no_other_from_being_added(
    tmp_path: Path, store: PromptStore, card: str | None, file: bytes | None
) -> None:
    add(tmp_path / "demo", "broken", card, value=0.1, file=file)
    add(tmp_path / "demo", "sound", None, value=0.2)

    assert load_demo_prompts(store, tmp_path / "demo") == ["sound"]
