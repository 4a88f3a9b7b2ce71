"""From logits to tokens, for all rows of a step at once, each row by its own parameters and its own seed.

The order of operations is vLLM's: logit bias and bans, penalties, temperature, min_p, top_k, top_p. Log-probabilities
are those of the backbone itself (before any of that), as the scoring harnesses expect.

A sampled row draws one uniform number a token, made from its seed and the token's index alone (splitmix64), and takes
the token where the cumulative probability passes it: whatever shares the batch, the same logits give the same token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.request import SamplingParams, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""Reported in place of minus infinity, which JSON cannot carry (vLLM's convention)."""

MIN_TEMPERATURE = 1e-5
"""Lower ones are raised to it: it is greedy already, and dividing by less leaves the range of fp32."""

NUM_RANKED = 1024
"""How many of the likeliest tokens truncation looks at first."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know of one row.

    `token_ids` are the client's and the generated tokens so far, `num_prompt_tokens` of them the client's; `seed` is
    the row's (never None here). `banned` are ids that may not be chosen now (EOS and stop ids before `min_tokens`).
    `wants_logprob` asks for the chosen token's log-probability even if the client did not.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    seed: int
    banned: frozenset[int] = frozenset()
    wants_logprob: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

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


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """Choose one token a row. `logits [len(rows), vocab_size]`, any float dtype; they are not changed."""
    if not rows:
        return []
    raw = logits.float()
    # NaN and +inf pass through a maximum; -inf may be a model's own mask and is harmless.
    is_finite = torch.isfinite(raw.amax(dim=-1)).tolist()
    adjusted = _adjust(raw, rows)
    chosen = adjusted.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and is_finite[i]]
    if drawn:
        index = torch.tensor(drawn, device=raw.device)
        chosen[index] = _draw(adjusted[index], [rows[i] for i in drawn])
    token_ids = chosen.tolist()
    logprobs = token_logprobs(raw, token_ids, [row.num_alternatives for row in rows])
    return [
        Sampled(token_id, logprob) if finite else Sampled(None, None)
        for token_id, logprob, finite in zip(token_ids, logprobs, is_finite, strict=True)
    ]


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_alternatives: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """The log-probability of `token_ids[i]` under `logits[i]` with its best alternatives; None where not asked for.

    `logits [n, vocab_size]`. The chosen token is always among `top` when alternatives are asked for, with the same
    float.
    """
    wanted = [i for i, num in enumerate(num_alternatives) if num is not None]
    result: list[TokenLogprob | None] = [None] * len(token_ids)
    if not wanted:
        return result
    index = torch.tensor(wanted, device=logits.device)
    logprobs = torch.log_softmax(logits[index].float(), dim=-1)
    ids = torch.tensor([token_ids[i] for i in wanted], device=logits.device)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    most = min(max(num_alternatives[i] or 0 for i in wanted), logprobs.shape[1])
    top_values, top_ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], ids[:, None][:, :0])
    rows = zip(wanted, chosen, top_values.tolist(), top_ids.tolist(), strict=True)
    for i, value, values, alternatives in rows:
        count = num_alternatives[i] or 0
        top = [(token, _clamp(v)) for token, v in zip(alternatives[:count], values[:count], strict=True)]
        if count and token_ids[i] not in {token for token, _ in top}:
            top.append((token_ids[i], _clamp(value)))
        result[i] = TokenLogprob(token_ids[i], _clamp(value), tuple(top))
    return result


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) made of `seed` and `index` alone: splitmix64 (Steele, Lea and Flood 2014), 53 bits."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def _clamp(value: float) -> float:
    return max(value, LOWEST_LOGPROB)


def _adjust(raw: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Logits with bias, bans and penalties. A copy is made only when some row asks for one of them."""
    touched = [i for i, row in enumerate(rows) if _is_adjusted(row)]
    if not touched:
        return raw
    adjusted = raw.clone()
    for i in touched:
        row, logits = rows[i], adjusted[i]
        params = row.params
        if params.logit_bias:
            biased = sorted(params.logit_bias)
            logits[_ids(biased, raw)] += torch.tensor([params.logit_bias[t] for t in biased]).to(logits)
        if row.banned:
            logits[_ids(row.banned, raw)] = float("-inf")
        if params.repetition_penalty != 1.0:
            seen = _ids(set(row.token_ids), raw)
            values = logits[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits[seen] = penalised
        if params.presence_penalty or params.frequency_penalty:
            ids, counts = np.unique(
                np.asarray(row.token_ids[row.num_prompt_tokens :], dtype=np.int64), return_counts=True
            )
            if ids.size:
                weights = params.presence_penalty + params.frequency_penalty * counts
                logits[torch.from_numpy(ids).to(raw.device)] -= torch.from_numpy(weights).to(logits)
    return adjusted


def _is_adjusted(row: SamplerRow) -> bool:
    p = row.params
    return bool(row.banned or p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty)


def _ids(ids: "Sequence[int] | set[int] | frozenset[int]", like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(ids), dtype=torch.long, device=like.device)


def _draw(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Sample each row of `logits [n, vocab_size]` by its temperature and truncation. Returns ids `[n]`."""
    device = logits.device
    temperatures = torch.tensor([max(row.params.temperature, MIN_TEMPERATURE) for row in rows], device=device)
    scaled = logits / temperatures[:, None]
    probs = torch.softmax(scaled, dim=-1)
    min_p = torch.tensor([row.params.min_p for row in rows], device=device)
    if bool((min_p > 0).any()):
        probs = torch.where(probs >= min_p[:, None] * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    truncated = [i for i, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1.0]
    if truncated:
        index = torch.tensor(truncated, device=device)
        probs[index] = _truncate(probs[index], [rows[i].params for i in truncated])
    cumulative = probs.double().cumsum(dim=-1)
    draws = torch.tensor([uniform(row.seed, row.num_generated) for row in rows], dtype=torch.float64, device=device)
    targets = draws * cumulative[:, -1]
    # The first token whose cumulative probability exceeds the target: never one of probability zero.
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def _truncate(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero what top_k and top_p leave out; exactly k stay where probabilities at the border are equal.

    A sort of the whole vocabulary takes longer than a decode step. Nearly always the likeliest thousand hold all that
    is kept; only for rows where they do not is the rest looked at.
    """
    vocab_size = probs.shape[1]
    total = probs.sum(dim=-1, keepdim=True)
    num_ranked = min(NUM_RANKED, vocab_size)
    ordered, order = probs.topk(num_ranked, dim=-1)
    reached = ordered.sum(dim=-1)
    unsettled = [
        i
        for i, p in enumerate(params)
        if num_ranked < vocab_size
        and (p.top_k > num_ranked or (p.top_k == 0 and float(reached[i]) < p.top_p * float(total[i])))
    ]
    if not unsettled:
        return _keep_ranked(probs, ordered, order, total, params)
    settled = [i for i in range(len(params)) if i not in set(unsettled)]
    result = torch.empty_like(probs)
    if settled:
        index = torch.tensor(settled, device=probs.device)
        result[index] = _keep_ranked(
            probs[index], ordered[index], order[index], total[index], [params[i] for i in settled]
        )
    index = torch.tensor(unsettled, device=probs.device)
    ordered, order = probs[index].sort(dim=-1, descending=True)
    result[index] = _keep_ranked(probs[index], ordered, order, total[index], [params[i] for i in unsettled])
    return result


def _keep_ranked(
    probs: torch.Tensor,
    ordered: torch.Tensor,
    order: torch.Tensor,
    total: torch.Tensor,
    params: Sequence[SamplingParams],
) -> torch.Tensor:
    """`probs [n, vocab_size]` with all zeroed but what stays among its likeliest `ordered`, at the ids `order`."""
    num_ranked = ordered.shape[1]
    ranks = torch.arange(num_ranked, device=probs.device)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else probs.shape[1] for p in params], device=probs.device)
    # After top_k, top_p is a share of what top_k has left (vLLM's order); without it, of everything.
    kept_total = torch.where(ranks < top_k[:, None], ordered, 0.0).sum(dim=-1, keepdim=True)
    total = torch.where(top_k[:, None] < probs.shape[1], kept_total, total)
    ordered = torch.where(ranks < top_k[:, None], ordered, 0.0)
    top_p = torch.tensor([p.top_p for p in params], device=probs.device)
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < top_p[:, None] * total) | (ranks == 0)
    return torch.zeros_like(probs).scatter_(1, order, torch.where(keep, ordered, 0.0))
