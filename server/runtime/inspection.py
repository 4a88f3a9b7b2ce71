"""What a prompt's own numbers say: how long its vectors are, what they lie next to, how two versions differ.

Owns which of these makes sense for which kind of prompt: vectors that stand for input embeddings are compared with the
vocabulary; a prefix, which holds keys and values, is described layer by layer. Refuses to know HTTP, and how a prompt
behaves (`server.runtime.comparison`). Blocking, without BLAS or OpenMP: for a thread beside the engine.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prompt_store.manifest import SoftPrompt
from server.engine.norms import (
    Array,
    NormStats,
    Numbers,
    cosines_of,
    describe_norms,
    norms_of,
    pairwise_cosines,
)
from server.errors import InvalidRequestError
from server.runtime.protocols import VocabularyLike


class TokenNames(Protocol):
    def text_of(self, token_id: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NearToken:
    """A token of the vocabulary beside a vector. `text` is what it adds to a text, its leading space included."""

    token_id: int
    text: str
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorReport:
    """One virtual token. `z_score` is its norm in standard deviations from the mean norm of the vocabulary; null where
    that does not vary. `nearest` is empty for a zero vector.
    """

    index: int
    norm: float
    z_score: float | None
    nearest: tuple[NearToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Norms of a prefix in one layer, one key and one value a virtual token, all heads together."""

    layer: int
    keys: NormStats
    values: NormStats


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineSummary:
    """Of pairs of different vectors of one prompt; those with a zero vector are left out."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """How near vectors of two versions are, place by place. `worst_cosine` and `worst_index` belong together.

    Cosines are null where every pair has a zero vector.
    """

    mean_cosine: float | None
    worst_cosine: float | None
    worst_index: int | None
    mean_distance: float
    worst_distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorDifference:
    """One virtual token in two versions. `cosine` is null where either vector is zero."""

    index: int
    cosine: float | None
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    layer: int
    keys: Closeness
    values: Closeness


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two versions compared over the virtual tokens that both have, the first `num_compared`.

    `vectors` is empty for prefixes; `layers` for vectors that stand for embeddings, which have `overall`.
    """

    num_compared: int
    overall: Closeness | None
    vectors: tuple[VectorDifference, ...]
    layers: tuple[LayerDifference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """`norms`, `pairwise` and `vectors` are for vectors that stand for embeddings, `layers` for prefixes."""

    norms: NormStats | None
    pairwise: CosineSummary | None
    vectors: tuple[VectorReport, ...]
    layers: tuple[LayerReport, ...]
    difference: Difference | None


def inspect(
    prompt: SoftPrompt, *, vocabulary: VocabularyLike, names: TokenNames, top: int, against: SoftPrompt | None = None
) -> Inspection:
    """Raises InvalidRequestError when `against` is of another kind."""
    difference = compare_numbers(prompt, against) if against is not None else None
    if prompt.kind == "prefix":
        return Inspection(
            norms=None, pairwise=None, vectors=(), layers=_describe_layers(prompt.values), difference=difference
        )
    norms = norms_of(prompt.values)
    return Inspection(
        norms=describe_norms(norms),
        pairwise=_summarize(pairwise_cosines(prompt.values)),
        vectors=_describe_vectors(prompt.values, norms, vocabulary, names, top),
        layers=(),
        difference=difference,
    )


def compare_numbers(prompt: SoftPrompt, against: SoftPrompt) -> Difference:
    """Raises InvalidRequestError when the two cannot be compared."""
    if prompt.kind != against.kind:
        raise InvalidRequestError(
            f"against: it is of kind {against.kind!r}, this version of kind {prompt.kind!r}; they have no numbers in "
            "common",
            param="against",
        )
    num_compared = min(prompt.num_virtual_tokens, against.num_virtual_tokens)
    if prompt.kind == "prefix":
        layers = tuple(
            LayerDifference(
                layer=layer,
                keys=_closeness(_by_token(one[0])[:num_compared], _by_token(other[0])[:num_compared]),
                values=_closeness(_by_token(one[1])[:num_compared], _by_token(other[1])[:num_compared]),
            )
            for layer, (one, other) in enumerate(zip(prompt.values, against.values, strict=True))
        )
        return Difference(num_compared=num_compared, overall=None, vectors=(), layers=layers)
    first, second = prompt.values[:num_compared], against.values[:num_compared]
    cosines, distances = cosines_of(first, second), _distances(first, second)
    vectors = tuple(
        VectorDifference(index=index, cosine=_finite(cosine), distance=distance)
        for index, (cosine, distance) in enumerate(zip(cosines.tolist(), distances.tolist(), strict=True))
    )
    return Difference(num_compared=num_compared, overall=_closeness(first, second), vectors=vectors, layers=())


def _describe_vectors(
    vectors: Array, norms: Numbers, vocabulary: VocabularyLike, names: TokenNames, top: int
) -> tuple[VectorReport, ...]:
    nearest = vocabulary.nearest(vectors, top)
    mean, std = vocabulary.norms.mean, vocabulary.norms.std
    reports = []
    for index, (norm, ids, cosines) in enumerate(
        zip(norms.tolist(), nearest.token_ids.tolist(), nearest.cosines.tolist(), strict=True)
    ):
        near = tuple(
            NearToken(token_id=token_id, text=names.text_of(token_id), cosine=cosine)
            for token_id, cosine in zip(ids, cosines, strict=True)
        )
        reports.append(
            VectorReport(
                index=index,
                norm=norm,
                z_score=(norm - mean) / std if std > 0 else None,
                nearest=near if norm > 0 else (),
            )
        )
    return tuple(reports)


def _describe_layers(values: Array) -> tuple[LayerReport, ...]:
    return tuple(
        LayerReport(
            layer=layer,
            keys=describe_norms(norms_of(_by_token(keys))),
            values=describe_norms(norms_of(_by_token(layer_values))),
        )
        for layer, (keys, layer_values) in enumerate(values)
    )


def _by_token(heads: Array) -> Array:
    """`[kv_heads, k, head_dim]` → `[k, kv_heads * head_dim]`."""
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


def _summarize(cosines: Numbers) -> CosineSummary | None:
    """None when there is no pair."""
    if not len(cosines):
        return None
    return CosineSummary(mean=float(cosines.mean()), min=float(cosines.min()), max=float(cosines.max()))


def _closeness(first: Array, second: Array) -> Closeness:
    cosines, distances = cosines_of(first, second), _distances(first, second)
    known = cosines[np.isfinite(cosines)]
    return Closeness(
        mean_cosine=float(known.mean()) if len(known) else None,
        worst_cosine=float(known.min()) if len(known) else None,
        worst_index=int(np.nanargmin(cosines)) if len(known) else None,
        mean_distance=float(distances.mean()),
        worst_distance=float(distances.max()),
    )


def _distances(first: Array, second: Array) -> Numbers:
    difference = first.astype(np.float64) - second
    distances: Numbers = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return distances


def _finite(cosine: float) -> float | None:
    return cosine if np.isfinite(cosine) else None
