"""A plain sampler to compare with: one row at a time, deciding on the host by values that it reads from the device."""

from collections.abc import Sequence

import numpy as np
import torch

from server.engine.request import SamplingParams, TokenLogprob
from server.engine.sampler import MIN_TEMPERATURE, Sampled, SamplerRow, uniform


def plain_sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    return [_sample_row(logits[i].float(), row) for i, row in enumerate(rows)]


def _sample_row(raw: torch.Tensor, row: SamplerRow) -> Sampled:
    if not bool(torch.isfinite(raw.max())):
        return Sampled(None, None)
    adjusted = _adjusted(raw, row)
    chosen = int(adjusted.argmax())
    if row.params.temperature > 0:
        chosen = _drawn(adjusted, row)
    return Sampled(chosen, _logprob(raw, chosen, row.num_alternatives))


def _adjusted(raw: torch.Tensor, row: SamplerRow) -> torch.Tensor:
    logits, params = raw.clone(), row.params
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in row.banned:
        logits[token] = float("-inf")
    if params.repetition_penalty != 1.0:
        for token in set(row.token_ids):
            value = logits[token]
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(np.asarray(row.token_ids[row.num_prompt_tokens :]), return_counts=True)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            logits[int(token)] -= torch.tensor(params.presence_penalty + params.frequency_penalty * count)
    return logits


def _drawn(logits: torch.Tensor, row: SamplerRow) -> int:
    params = row.params
    probs = torch.softmax(logits / torch.tensor(max(params.temperature, MIN_TEMPERATURE)), dim=-1)
    probs = torch.where(probs >= torch.tensor(params.min_p) * probs.max(), probs, 0.0)
    probs = _truncated(probs, params)
    cumulative = probs.double().cumsum(dim=-1)
    target = uniform(row.seed, row.num_generated) * cumulative[-1:]
    return min(int(torch.searchsorted(cumulative, target, right=True)), len(logits) - 1)


def _truncated(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    if params.top_k == 0 and params.top_p >= 1.0:
        return probs
    ordered, order = probs.sort(descending=True)
    total = probs.sum()
    if params.top_k:
        ordered[params.top_k :] = 0.0
        total = ordered.sum() if params.top_k < len(probs) else total
    before = ordered.cumsum(dim=-1) - ordered
    keep = before < torch.tensor(params.top_p) * total
    keep[0] = True
    return torch.zeros_like(probs).scatter_(0, order, torch.where(keep, ordered, 0.0))


def _logprob(raw: torch.Tensor, chosen: int, num_alternatives: int | None) -> TokenLogprob | None:
    if num_alternatives is None:
        return None
    logprobs = torch.log_softmax(raw, dim=-1)
    values, ids = logprobs.topk(min(num_alternatives, len(raw)))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    if num_alternatives and chosen not in ids.tolist():
        top.append((chosen, float(logprobs[chosen])))
    return TokenLogprob(chosen, float(logprobs[chosen]), tuple(top))
