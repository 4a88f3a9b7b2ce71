"""The vocabulary of a loaded backbone as vectors: which tokens a vector lies next to, and how long tokens are.

A soft prompt of kind "embeddings" lies in the space of the backbone's input embeddings, and the tokens nearest to it
say a little of what it learnt (Lester et al. 2021, section 7). Owns the walk over the vocabulary, in chunks, so that
neither a copy of it nor all its products are ever held. Refuses to know what is asked about and by whom.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from server.engine.norms import Array, NormStats, Numbers, describe_norms, unit_vectors
from server.engine.own_thread import enter_without_team

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class NearestTokens:
    """For each vector its nearest tokens, nearest first: ids and cosines, both `[k, top]`."""

    token_ids: npt.NDArray[np.int64]
    cosines: Array


class Vocabulary:
    """The first `size` input embeddings of a model, as the model itself looks them up.

    Any thread may ask, while the engine serves: the work is done one question at a time, in a thread that enters no
    OpenMP team.
    """

    def __init__(self, embeddings: nn.Module, *, size: int, device: torch.device) -> None:
        """Reads every embedding once, in the caller's thread."""
        self._embeddings = embeddings
        self._device = device
        self.size = min(size, int(embeddings.num_embeddings))  # type: ignore[arg-type]
        # Its thread begins with the first question and ends with this object.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="promptmux-inspect", initializer=enter_without_team)
        self.norms: NormStats = describe_norms(self._read_norms())

    def nearest(self, vectors: Array, top: int) -> NearestTokens:
        """The `top` tokens of largest cosine for each of `vectors [k, hidden_size]`; fewer where there are no more.

        A zero vector has a cosine of 0 with all. Takes a second for a few hundred vectors of a large model; blocking.
        """
        return self._thread.submit(self._find_nearest, vectors, min(top, self.size)).result()

    @torch.inference_mode()
    def _read_norms(self) -> Numbers:
        parts = [chunk.double().norm(dim=1).cpu() for _, chunk in self._chunks(1)]
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def _find_nearest(self, vectors: Array, top: int) -> NearestTokens:
        # In float64 first: squares of what fits a float32 need not fit one.
        units = torch.from_numpy(unit_vectors(vectors).astype(np.float32)).to(self._device)
        cosines = torch.empty((len(units), 0), device=self._device)
        token_ids = torch.empty((len(units), 0), dtype=torch.int64, device=self._device)
        for start, chunk in self._chunks(len(units)):
            found = units @ nn.functional.normalize(chunk).T
            ids = torch.arange(start, start + len(chunk), device=self._device).expand_as(found)
            cosines, places = torch.cat([cosines, found], dim=1).topk(min(top, start + len(chunk)), dim=1)
            token_ids = torch.cat([token_ids, ids], dim=1).gather(1, places)
        return NearestTokens(token_ids.cpu().numpy(), cosines.clamp(-1.0, 1.0).cpu().numpy())

    def _chunks(self, num_vectors: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Embeddings in float32, `[n, hidden_size]`, each with the id of its first; also their products are small."""
        width = int(self._embeddings(torch.zeros(1, dtype=torch.int64, device=self._device)).shape[1])
        num_rows = max(_CHUNK_BYTES // (4 * max(width, 4 * num_vectors)), 1)
        for start in range(0, self.size, num_rows):
            ids = torch.arange(start, min(start + num_rows, self.size), device=self._device)
            yield start, self._embeddings(ids).float()
