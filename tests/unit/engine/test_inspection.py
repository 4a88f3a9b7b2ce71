"""Nearest tokens and norms of a vocabulary, compared with torch's plainest words for both."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from server.engine import inspection
from server.engine.backbone import Backbone
from server.engine.inspection import Vocabulary
from server.engine.own_thread import run_in_own_thread
from tests.unit.engine.test_own_thread import all_threads

CPU = torch.device("cpu")


def table_of(backbone: Backbone) -> torch.Tensor:
    """Every embedding, as the model looks it up."""
    embeddings = backbone.model.get_input_embeddings()
    return embeddings(torch.arange(backbone.vocab_size)).float()


def oracle_cosines(vectors: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(vectors[:, None], table[None], dim=2)


@pytest.fixture(params=["llama", "gpt2", "gemma3_text", "opt"])
def backbone(request: pytest.FixtureRequest, tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    """Untied, tied, tied and scaled at look-up, tied."""
    family: str = request.param
    return Backbone.load(str(tiny_backbone_folder(family)), dtype="float32", device="cpu", max_model_len=64)


def test_norms_are_those_of_the_embeddings_as_the_model_looks_them_up(backbone: Backbone) -> None:
    norms = table_of(backbone).norm(dim=1)

    found = backbone.vocabulary.norms

    assert found.mean == pytest.approx(float(norms.mean()), rel=1e-6)
    assert found.std == pytest.approx(float(norms.std(correction=0)), rel=1e-5)
    quantiles = [found.min, found.p5, found.p25, found.p50, found.p75, found.p95, found.max]
    levels = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
    assert quantiles == pytest.approx(norms.quantile(levels).tolist(), rel=1e-6)
    shape = backbone.shape(8)
    assert (shape.embedding_norm_mean, shape.embedding_norm_std) == (found.mean, found.std)


def test_nearest_tokens_are_those_of_largest_cosine(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven tokens a chunk: the last chunk is a part of one.
    monkeypatch.setattr(inspection, "_CHUNK_BYTES", 7 * 4 * 32)
    vectors = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(1))

    found = backbone.vocabulary.nearest(vectors.numpy(), 9)

    expected = oracle_cosines(vectors, table_of(backbone)).topk(9, dim=1)
    assert found.token_ids.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(found.cosines), expected.values)


def test_the_embedding_of_a_token_lies_next_to_that_token(backbone: Backbone) -> None:
    token_ids = [5, 0, backbone.vocab_size - 1]

    found = backbone.vocabulary.nearest(3.5 * table_of(backbone)[token_ids].numpy(), 1)

    assert found.token_ids[:, 0].tolist() == token_ids
    assert found.cosines[:, 0] == pytest.approx(1.0, abs=1e-6)


def test_embeddings_packed_with_the_head_are_read_alike() -> None:
    from server.engine.linear import PackedEmbedding
    from server.engine.packed_weights import NativeProjections, native_is_usable

    if not native_is_usable():
        pytest.skip("this CPU has no native kernels")
    plain = nn.Embedding(70, 16, dtype=torch.bfloat16).requires_grad_(False)
    packed = PackedEmbedding(NativeProjections([plain.weight], [None], "none"))
    vectors = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)

    one, other = (Vocabulary(module, size=70, device=CPU) for module in (plain, packed))

    assert one.norms == other.norms
    assert one.nearest(vectors, 70).token_ids.tolist() == other.nearest(vectors, 70).token_ids.tolist()


def test_tokens_beyond_the_vocabulary_are_never_near() -> None:
    embeddings = nn.Embedding(10, 4).requires_grad_(False)
    vocabulary = Vocabulary(embeddings, size=6, device=CPU)

    found = vocabulary.nearest(embeddings.weight.numpy(), 10)

    assert vocabulary.size == 6
    assert found.token_ids.shape == (10, 6)
    assert set(found.token_ids.ravel().tolist()) == set(range(6))


def test_vectors_whose_squares_overflow_have_their_cosines() -> None:
    embeddings = nn.Embedding(10, 4).requires_grad_(False)
    vocabulary = Vocabulary(embeddings, size=10, device=CPU)

    found = vocabulary.nearest(1e30 * embeddings.weight.numpy(), 1)

    assert found.token_ids[:, 0].tolist() == list(range(10))
    assert found.cosines[:, 0] == pytest.approx(1.0, abs=1e-6)


def count_foreign(before: set[str]) -> int:
    """Threads since `before` that are not Python's, as a team's are, and that do not end: one that was joined may be
    seen for a moment still.
    """
    deadline = time.monotonic() + 5
    while True:
        foreign = all_threads() - before - {str(thread.native_id) for thread in threading.enumerate()}
        if not foreign or time.monotonic() > deadline:
            return len(foreign)
        time.sleep(0.005)


def test_asking_starts_no_team() -> None:
    embeddings = nn.Embedding(20_000, 64).requires_grad_(False)
    vocabulary = Vocabulary(embeddings, size=20_000, device=CPU)
    vectors = np.ones((40, 64), np.float32)

    def ask() -> tuple[int, int]:
        # The default that a new thread begins with, which on a machine with one CPU is one.
        torch.set_num_threads(3)
        before = all_threads()
        vocabulary.nearest(vectors, 5)
        vocabulary.nearest(vectors, 5)
        default: list[int] = []
        later = threading.Thread(target=lambda: default.append(torch.get_num_threads()))
        later.start()
        later.join()
        return count_foreign(before), default[0]

    num_threads = torch.get_num_threads()
    try:
        num_of_teams, default = run_in_own_thread(ask)
    finally:
        torch.set_num_threads(num_threads)

    assert num_of_teams == 0
    assert default == 3
