"""What a sound prompt is warned of, by its stable code."""

from dataclasses import replace

import numpy as np
import pytest

from prompt_store.formats import check_file
from tests.unit.prompt_store.prompt_files import (
    BACKBONE,
    CONFIG,
    K,
    make_config,
    make_file,
    make_prefix_file,
    random_embeddings,
)

MEASURED = replace(BACKBONE, num_parameters=10**9, embedding_norm_mean=2.0, embedding_norm_std=0.1)


def codes(values: np.ndarray, *, backbone: object = MEASURED) -> list[str]:
    checked = check_file(make_file({"prompt_embeddings": values}), CONFIG, backbone=backbone)  # type: ignore[arg-type]
    return [warning.partition(":")[0] for warning in checked.warnings]


def of_norm(norm: float, k: int = K) -> np.ndarray:
    values = random_embeddings(0, k)
    return (values / np.linalg.norm(values, axis=1, keepdims=True) * norm).astype(np.float32)


@pytest.mark.parametrize(
    ("norm", "expected"), [(2.0, []), (9.9, []), (10.1, ["unusual_norms"]), (0.41, []), (0.39, ["unusual_norms"])]
)
def test_norms_far_from_the_vocabularys(norm: float, expected: list[str]) -> None:
    assert codes(of_norm(norm)) == expected


def test_norms_within_the_vocabularys_own_spread_are_usual() -> None:
    assert codes(of_norm(11.0), backbone=replace(MEASURED, embedding_norm_std=3.0)) == []


def test_one_far_vector_is_counted() -> None:
    values = of_norm(2.0)
    values[3] *= 100
    checked = check_file(make_file({"prompt_embeddings": values}), CONFIG, backbone=MEASURED)
    assert checked.warnings[0].startswith("unusual_norms: 1 of 20 vectors")


@pytest.mark.parametrize(("k", "expected"), [(19, ["few_virtual_tokens"]), (20, [])])
def test_few_virtual_tokens(k: int, expected: list[str]) -> None:
    assert codes(of_norm(2.0, k)) == expected


def test_backbone_under_a_billion_parameters() -> None:
    assert codes(of_norm(2.0), backbone=replace(MEASURED, num_parameters=10**9 - 1)) == ["small_backbone"]


def test_prefix_has_neither_a_small_backbone_nor_unusual_norms() -> None:
    small = replace(MEASURED, num_parameters=1)
    assert not check_file(make_prefix_file(k=5), make_config(peft_type="PREFIX_TUNING"), backbone=small).warnings


def test_what_is_not_known_of_a_backbone_gives_no_warning() -> None:
    assert codes(of_norm(1000.0), backbone=BACKBONE) == []
