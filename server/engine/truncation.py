"""What top_k and top_p leave of a distribution.

A sort of the whole vocabulary takes longer than a decode step on a CPU. Nearly always the likeliest thousand hold all
that is kept, and only for rows where they do not is the rest looked at; but whether they do is written in the numbers,
and a host that asks for them waits for the device. So there are two ways, which keep the same tokens: one that may ask,
and one that sorts wherever the parameters alone do not say that the likeliest thousand are enough.
"""

from collections.abc import Sequence

import numpy as np
import torch

from server.engine.request import SamplingParams
from server.engine.transfers import upload

NUM_RANKED = 1024
"""How many of the likeliest tokens are looked at first."""


def truncate(probs: torch.Tensor, params: Sequence[SamplingParams], *, may_wait: bool) -> torch.Tensor:
    """`probs [n, vocab_size]` with all zeroed that top_k and top_p leave out.

    Exactly k stay where probabilities at the border are equal. Without `may_wait` nothing is asked of the device.
    """
    num_ranked = min(NUM_RANKED, probs.shape[1])
    if num_ranked == probs.shape[1]:
        return _among_likeliest(probs, num_ranked, params)
    if may_wait:
        return _truncate_waiting(probs, num_ranked, params)
    ranked = [i for i, p in enumerate(params) if 0 < p.top_k <= num_ranked]
    sorted_ = [i for i, p in enumerate(params) if not 0 < p.top_k <= num_ranked]
    result = torch.empty_like(probs)
    for rows, count in ((ranked, num_ranked), (sorted_, probs.shape[1])):
        if len(rows) == len(params):
            return _among_likeliest(probs, count, params)
        if rows:
            (index,) = upload([np.array(rows, dtype=np.int64)], probs.device)
            result[index] = _among_likeliest(probs[index], count, [params[i] for i in rows])
    return result


def _truncate_waiting(probs: torch.Tensor, num_ranked: int, params: Sequence[SamplingParams]) -> torch.Tensor:
    total = probs.sum(dim=-1, keepdim=True)
    ordered, order = probs.topk(num_ranked, dim=-1)
    reached, all_of_it = ordered.sum(dim=-1).tolist(), total[:, 0].tolist()
    unsettled = [
        i
        for i, p in enumerate(params)
        if p.top_k > num_ranked or (p.top_k == 0 and reached[i] < p.top_p * all_of_it[i])
    ]
    result = _keep(probs, ordered, order, total, params)
    if unsettled:
        (index,) = upload([np.array(unsettled, dtype=np.int64)], probs.device)
        result[index] = _among_likeliest(probs[index], probs.shape[1], [params[i] for i in unsettled])
    return result


def _among_likeliest(probs: torch.Tensor, count: int, params: Sequence[SamplingParams]) -> torch.Tensor:
    """What stays, looked for among the `count` likeliest; all of them are sorted."""
    if count < probs.shape[1]:
        ordered, order = probs.topk(count, dim=-1)
    else:
        ordered, order = probs.sort(dim=-1, descending=True)
    return _keep(probs, ordered, order, probs.sum(dim=-1, keepdim=True), params)


def _keep(
    probs: torch.Tensor,
    ordered: torch.Tensor,
    order: torch.Tensor,
    total: torch.Tensor,
    params: Sequence[SamplingParams],
) -> torch.Tensor:
    """`probs [n, vocab_size]` with all zeroed but what stays among its likeliest `ordered`, at the ids `order`."""
    num_ranked, vocab_size = ordered.shape[1], probs.shape[1]
    top_k, top_p = upload(
        [
            np.array([[p.top_k if p.top_k > 0 else vocab_size] for p in params], dtype=np.int64),
            np.array([[p.top_p] for p in params], dtype=np.float32),
        ],
        probs.device,
    )
    ranks = torch.arange(num_ranked, device=probs.device)
    # After top_k, top_p is a share of what top_k has left (vLLM's order); without it, of everything.
    ordered = torch.where(ranks < top_k, ordered, 0.0)
    total = torch.where(top_k < vocab_size, ordered.sum(dim=-1, keepdim=True), total)
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < top_p * total) | (ranks == 0)
    return torch.zeros_like(probs).scatter_(1, order, torch.where(keep, ordered, 0.0))
