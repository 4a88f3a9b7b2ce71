"""The requests of a benchmark: drawn from a seed, the same for every system that is measured.

Owns lengths, client tokens and which request has which prompt. Refuses to know when a request is sent and to whom.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self, overload

import numpy as np
import numpy.typing as npt

FIRST_TOKEN_ID = 3  # below it are padding, BOS and EOS in most vocabularies
_BLOCK = 256
_LENGTHS_HELP = "N (fixed), LOW-HIGH (uniform) or lognormal:MEDIAN:SIGMA:LOW-HIGH"
_RANGE = re.compile(r"^([0-9]{1,9})(?:-([0-9]{1,9}))?$")


class WorkloadError(ValueError):
    """A workload cannot be drawn; `field` names the argument that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution of numbers of tokens, from `low` to `high`, both included.

    "lognormal" draws exp(N(log `median`, `sigma`)), rounded and cut to the range: the long tail of real answers.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def fixed(cls, count: int) -> Self:
        return cls(kind="fixed", low=count, high=count)

    @classmethod
    def parse(cls, text: str, field: str = "lengths") -> Self:
        """`32`, `8-64` or `lognormal:24:0.9:4-128`. Raises WorkloadError that names `field`."""
        kind, _, rest = text.partition(":")
        if not rest:
            low, high = cls._parse_range(text, field)
            return cls(kind="fixed" if low == high else "uniform", low=low, high=high)
        parts = rest.split(":")
        if kind != "lognormal" or len(parts) != 3:
            raise WorkloadError(field, f"{text!r} is none of {_LENGTHS_HELP}")
        try:
            median, sigma = float(parts[0]), float(parts[1])
        except ValueError:
            raise WorkloadError(field, f"{text!r}: median and sigma must be numbers") from None
        low, high = cls._parse_range(parts[2], field)
        if not (low <= median <= high and 0 < sigma <= 10):
            raise WorkloadError(field, f"{text!r}: the median must lie in the range, sigma between 0 and 10")
        return cls(kind="lognormal", low=low, high=high, median=median, sigma=sigma)

    @staticmethod
    def _parse_range(text: str, field: str) -> tuple[int, int]:
        found = _RANGE.match(text)
        if found is None:
            raise WorkloadError(field, f"{text!r} is none of {_LENGTHS_HELP}")
        low = int(found[1])
        high = int(found[2] or low)
        if not 1 <= low <= high:
            raise WorkloadError(field, f"{text!r}: lengths start at 1, and the lower comes first")
        return low, high

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """`count` lengths, `[count]`, int64."""
        if self.kind == "fixed":
            return np.full(count, self.low)
        if self.kind == "uniform":
            return rng.integers(self.low, self.high + 1, count)
        drawn = np.round(rng.lognormal(np.log(self.median), self.sigma, count))
        return np.clip(drawn, self.low, self.high).astype(np.int64)

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(self.low)
        span = f"{self.low}-{self.high}"
        return span if self.kind == "uniform" else f"lognormal:{self.median:g}:{self.sigma:g}:{span}"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: which of the workload's prompts (None: the bare backbone), its tokens, how many new ones."""

    prompt: int | None
    token_ids: tuple[int, ...]
    num_new_tokens: int


class PromptPicker:
    """Which prompt each request has: all in turn, or the r-th with a probability in proportion to 1 / r**zipf."""

    def __init__(self, num_prompts: int, *, zipf: float | None = None, seed: int = 0) -> None:
        """`num_prompts` 0 is the bare backbone. Raises WorkloadError for a `zipf` that is negative."""
        if zipf is not None and not 0 <= zipf <= 100:
            raise WorkloadError("zipf", f"the exponent is {zipf}; it goes from 0 (all alike) to 100")
        self._num_prompts = num_prompts
        self._rng = np.random.default_rng((seed, 2))
        self._next = 0
        self._shares: npt.NDArray[np.float64] | None = None
        if zipf is not None and num_prompts:
            weights = np.arange(1, num_prompts + 1, dtype=np.float64) ** -zipf
            self._shares = weights / weights.sum()

    def pick(self, count: int) -> list[int | None]:
        """The next `count` choices."""
        if not self._num_prompts:
            return [None] * count
        if self._shares is not None:
            return [int(i) for i in self._rng.choice(self._num_prompts, count, p=self._shares)]
        first = self._next
        self._next += count
        return [i % self._num_prompts for i in range(first, first + count)]


class RequestSource:
    """An endless supply of requests. Tokens and lengths depend on the seed alone, not on the prompts."""

    def __init__(
        self,
        *,
        vocab_size: int,
        prompt_tokens: Lengths,
        new_tokens: Lengths,
        picker: PromptPicker,
        seed: int | Sequence[int],
    ) -> None:
        """Client tokens are uniform over the ids from `FIRST_TOKEN_ID` to below `vocab_size`. Raises WorkloadError."""
        if vocab_size <= FIRST_TOKEN_ID:
            raise WorkloadError("vocab_size", f"a vocabulary of {vocab_size} leaves no token to draw")
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._picker = picker

    def take(self, count: int) -> list[BenchRequest]:
        """The next `count` requests."""
        lengths = self._prompt_tokens.draw(self._rng, count)
        ids = [tuple(self._rng.integers(FIRST_TOKEN_ID, self._vocab_size, int(n)).tolist()) for n in lengths]
        new = self._new_tokens.draw(self._rng, count)
        prompts = self._picker.pick(count)
        return [BenchRequest(prompt, *rest) for prompt, *rest in zip(prompts, ids, new.tolist(), strict=True)]

    def __iter__(self) -> Iterator[BenchRequest]:
        while True:
            yield from self.take(_BLOCK)


class RandomPrompts(Sequence[npt.NDArray[np.float32]]):
    """Prompts `[k, hidden_size]`, float32, of vectors that are rows of the vocabulary; made when they are asked for.

    Ten thousand prompts so take the room of their token ids.
    """

    def __init__(self, embeddings: npt.NDArray[np.float32], *, num_prompts: int, k: int, seed: int) -> None:
        """`embeddings [vocab_size, hidden_size]` are the backbone's. Raises WorkloadError for a `k` below 1."""
        if k < 1:
            raise WorkloadError("k", f"a prompt has at least one virtual token, not {k}")
        rng = np.random.default_rng(seed)
        self._embeddings = embeddings
        self._ids = [rng.integers(FIRST_TOKEN_ID, len(embeddings), k) for _ in range(num_prompts)]

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.float32]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[npt.NDArray[np.float32]]: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]]:
        if isinstance(index, slice):
            return [self._embeddings[ids] for ids in self._ids[index]]
        return self._embeddings[self._ids[index]]


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts` are embeddings `[k, hidden_size]`, float32; `requests` refer to them by index."""

    prompts: Sequence[npt.NDArray[np.float32]]
    requests: Sequence[BenchRequest]

    @property
    def num_new_tokens(self) -> int:
        return sum(request.num_new_tokens for request in self.requests)


NEW_TOKENS = {"fixed": Lengths.fixed(32), "lognormal": Lengths.parse("lognormal:24:0.9:4-128")}


def make_workload(
    embeddings: npt.NDArray[np.float32],
    *,
    num_requests: int,
    num_prompts: int,
    k: int,
    new_tokens: str,
    seed: int,
) -> Workload:
    """The workload of the repository's benchmarks. `embeddings [vocab_size, hidden_size]` are the backbone's.

    Client tokens: uniform over 8 to 64. `new_tokens` names one of `NEW_TOKENS`. Prompts take turns; the requests'
    tokens and lengths do not depend on how many there are.
    """
    if new_tokens not in NEW_TOKENS:
        raise WorkloadError("new_tokens", f"new_tokens is {new_tokens!r}; known are {', '.join(NEW_TOKENS)}")
    source = RequestSource(
        vocab_size=len(embeddings),
        prompt_tokens=Lengths.parse("8-64"),
        new_tokens=NEW_TOKENS[new_tokens],
        picker=PromptPicker(num_prompts),
        seed=seed,
    )
    return Workload(RandomPrompts(embeddings, num_prompts=num_prompts, k=k, seed=seed + 1), source.take(num_requests))
