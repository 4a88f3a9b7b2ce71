"""Lengths of vectors and the angles between them, in float64: what inspection says of prompts and of the vocabulary.

Owns the arithmetic on plain arrays. Refuses to know torch, so that whoever has vectors can ask, and never calls BLAS,
whose threads would take the CPU from the engine's.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStats:
    """How norms are spread: mean, population standard deviation, and quantiles."""

    mean: float
    std: float
    min: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float


def norms_of(vectors: Array) -> Numbers:
    """Euclidean norms of `[n, d]`: `[n]`."""
    norms: Numbers = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return norms


def describe_norms(norms: Numbers) -> NormStats:
    """Of at least one norm."""
    quantiles = np.quantile(norms, (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)).tolist()
    smallest, p5, p25, p50, p75, p95, largest = quantiles
    return NormStats(
        mean=float(norms.mean()),
        std=float(norms.std()),
        min=smallest,
        p5=p5,
        p25=p25,
        p50=p50,
        p75=p75,
        p95=p95,
        max=largest,
    )


def unit_vectors(vectors: Array) -> Numbers:
    """`[n, d]` divided by its norms; a zero vector stays zero."""
    norms = norms_of(vectors)
    return vectors / np.where(norms > 0, norms, 1.0)[:, None]


def cosines_of(first: Array, second: Array) -> Numbers:
    """Cosine of each vector of `[n, d]` with the one in its place: `[n]`; NaN where either is zero."""
    cosines = np.einsum("nd,nd->n", unit_vectors(first), unit_vectors(second)).clip(-1.0, 1.0)
    return np.where((norms_of(first) > 0) & (norms_of(second) > 0), cosines, np.nan)


def pairwise_cosines(vectors: Array) -> Numbers:
    """Cosine of each pair of different vectors of `[n, d]`, in one row; pairs with a zero vector are left out."""
    units = unit_vectors(vectors[norms_of(vectors) > 0])
    products: Numbers = np.einsum("id,jd->ij", units, units).clip(-1.0, 1.0)
    return products[np.triu_indices(len(units), k=1)]
