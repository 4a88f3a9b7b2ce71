"""What an upload may bring, and which backbone it is for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from prompt_store.errors import (
    FileTooLarge,
    InvalidName,
    InvalidValue,
    PromptMismatch,
    PromptStoreError,
)
from prompt_store.location import Location
from prompt_store.manifest import StoreLimits
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import (
    BACKBONE,
    CONFIG,
    make_config,
    make_file,
    make_multitask_file,
    make_prefix_file,
    put,
    random_embeddings,
)


def test_prompt_of_another_backbone_is_not_loaded_although_its_shapes_fit(location: Location) -> None:
    with PromptStore.open(location, backbone=BACKBONE) as store:
        put(store, 1)
    with PromptStore.open(location, backbone=dataclasses.replace(BACKBONE, fingerprint="cd" * 32)) as store:
        version = store.resolve("acme", "task")
        with pytest.raises(PromptMismatch, match="cdcdcdcdcdcd"):
            store.load(version)
        assert store.resolve("acme", "task").state == "active"


def test_same_file_under_another_backbone_is_a_version_of_its_own(location: Location) -> None:
    with PromptStore.open(location, backbone=BACKBONE) as store:
        first = put(store, 1)
    with PromptStore.open(location, backbone=dataclasses.replace(BACKBONE, fingerprint="cd" * 32)) as store:
        second = put(store, 1)
        assert (second.version, second.digest, second.state) == (2, first.digest, "active")
        assert second.prefix_key != first.prefix_key
        np.testing.assert_array_equal(store.load(second).values, random_embeddings(1))
        store.check_invariants()


def test_upload_takes_a_path(store: PromptStore, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(make_file(seed=1))
    version, _ = store.upload("acme", "task", file=path, config=CONFIG)
    assert store.read_file(version) == path.read_bytes()


def test_one_file_for_two_tasks_of_its_own_makes_two_versions(store: PromptStore) -> None:
    config, file = make_config(peft_type="MULTITASK_PROMPT_TUNING"), make_multitask_file(3)
    versions = [store.upload("t", "task", file=file, config=config, task_index=index)[0] for index in (0, 2)]
    assert [version.version for version in versions] == [1, 2]
    assert versions[0].prefix_key != versions[1].prefix_key
    assert not np.array_equal(store.load(versions[0]).values, store.load(versions[1]).values)
    assert store.resolve("t", f"task@sha256:{versions[0].digest}") == versions[1]


def test_prompt_of_another_backbone_is_refused_at_load_but_not_quarantined(location: Location) -> None:
    with PromptStore.open(location, backbone=BACKBONE) as store:
        version = put(store, 1)
    with PromptStore.open(location, backbone=dataclasses.replace(BACKBONE, hidden_size=16)) as store:
        with pytest.raises(PromptMismatch, match="16"):
            store.load(version)
        assert store.resolve("acme", "task").state == "active"


def test_backbone_may_come_later(location: Location) -> None:
    with PromptStore.open(location) as store:
        with pytest.raises(PromptStoreError, match="backbone"):
            put(store, 1)
        store.use_backbone(BACKBONE)
        put(store, 1)


def test_limits_are_kept(location: Location) -> None:
    limits = StoreLimits(max_file_bytes=300, max_config_bytes=100, max_metadata_bytes=50, max_virtual_tokens=4)
    with PromptStore.open(location, backbone=BACKBONE, limits=limits) as store:
        small = make_file({"prompt_embeddings": random_embeddings(0, k=4)})
        with pytest.raises(FileTooLarge) as caught:
            store.upload("t", "task", file=make_file(), config=CONFIG)
        assert caught.value.param == "file"
        with pytest.raises(FileTooLarge):
            store.upload("t", "task", file=Path("/dev/zero"), config=CONFIG)
        with pytest.raises(FileTooLarge) as caught:
            store.upload("t", "task", file=small, config=make_config(more="x" * 100))
        assert caught.value.param == "config"
        with pytest.raises(FileTooLarge) as caught:
            store.upload("t", "task", file=small, config=CONFIG, metadata={"a": "x" * 50})
        assert caught.value.param == "metadata"
        five = make_file({"prompt_embeddings": random_embeddings(0, k=5).astype(np.float16)})
        with pytest.raises(PromptMismatch, match="at most 4"):
            store.upload("t", "task", file=five, config=CONFIG)
        assert store.counts().num_tasks == 0


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a..b", "a/b", "a" * 64, "a b", "ä", "a\n", "../x", "a@1"])
def test_bad_names_are_refused(store: PromptStore, name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        put(store, 1, task=name)
    assert caught.value.param == "task"
    with pytest.raises(InvalidName) as caught:
        put(store, 1, tenant=name)
    assert caught.value.param == "tenant"


def test_the_backbones_own_name_is_reserved(location: Location) -> None:
    with (
        PromptStore.open(location, backbone=dataclasses.replace(BACKBONE, name="tiny")) as store,
        pytest.raises(InvalidName, match="backbone"),
    ):
        put(store, 1, task="tiny")


@pytest.mark.parametrize(
    "metadata", [{"a": float("nan")}, {"a": object()}, {"a": "\ud800"}, {"a": "\x00"}, {"a": {"b": float("inf")}}]
)
def test_metadata_that_is_not_sound_json_is_refused(store: PromptStore, metadata: dict[str, object]) -> None:
    with pytest.raises(InvalidValue) as caught:
        put(store, 1, metadata=metadata)
    assert caught.value.param == "metadata"


@pytest.mark.parametrize("text", ["\\u0000", "\\\\u0000", "\\", "u0000"])
def test_text_that_only_looks_like_the_escape_of_nul_is_kept(store: PromptStore, text: str) -> None:
    assert put(store, 1, metadata={"a": text}).metadata == {"a": text}


@pytest.mark.parametrize("text", ["\x00", "\\\x00", "\\\\\x00"])
def test_nul_behind_backslashes_is_refused(store: PromptStore, text: str) -> None:
    with pytest.raises(InvalidValue):
        put(store, 1, metadata={"a": text})


def test_prefix_files_are_stored_and_loaded(store: PromptStore) -> None:
    config = make_config(peft_type="PREFIX_TUNING", num_attention_heads=2)
    version, _ = store.upload("acme", "task", file=make_prefix_file(), config=config)
    assert store.load(version).values.shape == (3, 2, 2, 20, 4)
    assert store.load(version).num_virtual_tokens == 20
    assert json.loads(store.read_config(version))["peft_type"] == "PREFIX_TUNING"
