"""Norms and cosines of plain arrays, compared with numpy's own linear algebra."""

import numpy as np
import pytest

from server.engine.norms import cosines_of, norms_of, pairwise_cosines

VECTORS = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)


def test_norms_are_euclidean() -> None:
    assert norms_of(VECTORS) == pytest.approx(np.linalg.norm(VECTORS.astype(np.float64), axis=1))


def test_norms_of_large_numbers_do_not_overflow() -> None:
    assert norms_of(np.full((1, 4), 1e30, np.float32)) == pytest.approx([2e30])


def test_cosines_are_of_vectors_in_the_same_place() -> None:
    other = VECTORS[::-1].copy()
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(VECTORS, other, strict=True)]

    assert cosines_of(VECTORS, other) == pytest.approx(expected, abs=1e-6)
    assert cosines_of(VECTORS, 4 * VECTORS) == pytest.approx(np.ones(6))


def test_cosine_with_a_zero_vector_is_not_a_number() -> None:
    assert np.isnan(cosines_of(VECTORS[:1], np.zeros((1, 5), np.float32))).all()


def test_each_pair_is_there_once_and_zero_vectors_are_left_out() -> None:
    with_zero = np.concatenate([VECTORS, np.zeros((1, 5), np.float32)])
    units = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    expected = [float(units[i] @ units[j]) for i in range(6) for j in range(i + 1, 6)]

    assert pairwise_cosines(with_zero) == pytest.approx(expected, abs=1e-6)
    assert len(pairwise_cosines(VECTORS[:1])) == 0
