"""From logits to tokens, for all rows of a step at once, each row by its own parameters and its own seed.

The order of operations is vLLM's: logit bias and bans, penalties, temperature, min_p, top_k, top_p.

A sampled row draws one uniform number a token, made from its seed and the token's index alone (splitmix64), and takes
the token where the cumulative probability passes it: whatever shares the batch, the same logits give the same token.

Sampling has two halves. `sample_async` gives the device its work and returns; the tokens lie on the device, where the
next step may take them, and are on their way to the host. `DeviceSample.to_host` waits for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.logprobs import LOWEST_LOGPROB as LOWEST_LOGPROB
from server.engine.logprobs import DeviceLogprobs
from server.engine.logprobs import token_logprobs as token_logprobs
from server.engine.request import SamplingParams, TokenLogprob
from server.engine.transfers import Array, Download, upload
from server.engine.truncation import truncate

MIN_TEMPERATURE = 1e-5
"""Lower ones are raised to it: it is greedy already, and dividing by less leaves the range of fp32."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know of one row.

    `token_ids` are the client's and the generated tokens so far, `num_prompt_tokens` of them the client's, and
    `num_pending` more have been sampled that the host does not know yet; `seed` is the row's (never None here).
    `banned` are ids that may not be chosen now (EOS and stop ids before `min_tokens`). `wants_logprob` asks for the
    chosen token's log-probability even if the client did not.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    seed: int
    banned: frozenset[int] = frozenset()
    wants_logprob: bool = False
    num_pending: int = 0

    @property
    def num_generated(self) -> int:
        """The index of the token that is to be sampled."""
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def num_alternatives(self) -> int | None:
        if self.params.logprobs is not None:
            return self.params.logprobs
        return 0 if self.wants_logprob else None


@dataclass(frozen=True, slots=True)
class Sampled:
    """`token_id` is None when the row's logits are not finite: the row has to end."""

    token_id: int | None
    logprob: TokenLogprob | None


class DeviceSample:
    """One token a row, chosen on the device. `token_ids [n]`, int64; a row with logits that are not finite has some."""

    def __init__(self, token_ids: torch.Tensor, is_finite: torch.Tensor, logprobs: DeviceLogprobs) -> None:
        self.token_ids = token_ids
        self._sampled: list[Sampled] | None = None
        self._download = Download([torch.stack([token_ids, is_finite.long()])])
        self._logprobs = logprobs

    def to_host(self) -> list[Sampled]:
        """Waits for the device, but not for what it was given after the sample."""
        if self._sampled is None:
            (numbers,) = self._download.wait()
            token_ids, is_finite = numbers.tolist()
            self._sampled = [
                Sampled(token_id, logprob) if finite else Sampled(None, None)
                for token_id, logprob, finite in zip(token_ids, self._logprobs.to_host(), is_finite, strict=True)
            ]
        return self._sampled


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """Choose one token a row. `logits [len(rows), vocab_size]`, any float dtype; they are not changed."""
    return sample_async(logits, rows, may_wait=True).to_host() if rows else []


def sample_async(logits: torch.Tensor, rows: Sequence[SamplerRow], *, may_wait: bool) -> DeviceSample:
    """Have one token chosen for each of one or more rows.

    `logits [len(rows), vocab_size]`, any float dtype; they are not changed, and may be once this returns. Without
    `may_wait` nothing is asked of the device; with it, a look at its numbers may save work (`truncation`).
    """
    raw = logits.float()
    # NaN and +inf pass through a maximum; -inf may be a model's own mask and is harmless.
    is_finite = torch.isfinite(raw.amax(dim=-1))
    adjusted = _adjust(raw, rows)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if len(drawn) == len(rows):
        token_ids = _draw(adjusted, rows, may_wait)
    else:
        token_ids = adjusted.argmax(dim=-1)
        if drawn:
            (index,) = upload([np.array(drawn, dtype=np.int64)], raw.device)
            token_ids[index] = _draw(adjusted[index], [rows[i] for i in drawn], may_wait)
    return DeviceSample(token_ids, is_finite, DeviceLogprobs(raw, token_ids, [row.num_alternatives for row in rows]))


def reads_own_tokens(params: SamplingParams) -> bool:
    """Whether what is chosen depends on which tokens the row has: then all of them must be known before."""
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) made of `seed` and `index` alone: splitmix64 (Steele, Lea and Flood 2014), 53 bits."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


class _Edits:
    """One kind of change to single logits, of all rows together: which of a row's tokens, and by what."""

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._ids: list[Array] = []
        self._values: list[Array] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, ids: Array, values: Array | float) -> None:
        """`ids` are distinct."""
        self._rows.append(np.full(len(ids), row, dtype=np.int64))
        self._ids.append(ids.astype(np.int64))
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), ids.shape))

    def arrays(self) -> list[Array]:
        return [np.concatenate(parts) for parts in (self._rows, self._ids, self._values)]


def _adjust(raw: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Logits with bias, bans and penalties. A copy is made only when some row asks for one of them."""
    biases, bans, factors, losses = kinds = [_Edits() for _ in range(4)]
    for i, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            biases.add(i, np.array(list(params.logit_bias)), np.array(list(params.logit_bias.values())))
        if row.banned:
            bans.add(i, np.array(list(row.banned)), float("-inf"))
        if params.repetition_penalty != 1.0:
            factors.add(i, np.unique(np.asarray(row.token_ids)), params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and len(row.token_ids) > row.num_prompt_tokens:
            ids, counts = np.unique(np.asarray(row.token_ids[row.num_prompt_tokens :]), return_counts=True)
            losses.add(i, ids, params.presence_penalty + params.frequency_penalty * counts)
    asked = [edits for edits in kinds if edits]
    if not asked:
        return raw
    uploaded = iter(upload([array for edits in asked for array in edits.arrays()], raw.device))
    adjusted = raw.clone()
    for edits in asked:
        places, values = (next(uploaded), next(uploaded)), next(uploaded)
        found = adjusted[places]
        if edits is biases:
            changed = found + values
        elif edits is bans:
            changed = values
        elif edits is factors:
            changed = torch.where(found > 0, found / values, found * values)
        else:
            changed = found - values
        adjusted[places] = changed
    return adjusted


def _draw(logits: torch.Tensor, rows: Sequence[SamplerRow], may_wait: bool) -> torch.Tensor:
    """Sample each row of `logits [n, vocab_size]` by its temperature and truncation. Returns ids `[n]`."""
    params = [row.params for row in rows]
    truncated = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    temperatures, min_p, draws, index = upload(
        [
            np.array([[max(p.temperature, MIN_TEMPERATURE)] for p in params], dtype=np.float32),
            np.array([[p.min_p] for p in params], dtype=np.float32),
            np.array([[uniform(row.seed, row.num_generated)] for row in rows], dtype=np.float64),
            np.array(truncated, dtype=np.int64),
        ],
        logits.device,
    )
    probs = torch.softmax(logits / temperatures, dim=-1)
    if any(p.min_p > 0 for p in params):
        probs = torch.where(probs >= min_p * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    if len(truncated) == len(rows):
        probs = truncate(probs, params, may_wait=may_wait)
    elif truncated:
        probs[index] = truncate(probs[index], [params[i] for i in truncated], may_wait=may_wait)
    cumulative = probs.double().cumsum(dim=-1)
    targets = draws * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: never one of probability zero.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
