"""Losses a target token, in fp32, without a copy of all logits in fp32.

A head over a large vocabulary makes the largest tensor of the pass. Here it is read in chunks, forward and backward,
and kept once, in the backbone's dtype. A target whose logits are not finite spoils its own loss and gradient alone.
"""

from collections.abc import Callable
from typing import Any

import torch

_CHUNK_ELEMENTS = 1 << 22


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        losses = [
            torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(_chunks(logits), _like(targets, logits), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets = ctx.saved_tensors
        answer = torch.empty_like(logits)
        parts = zip(_chunks(answer), _chunks(logits), _like(targets, logits), _like(grads[0], logits), strict=True)
        for out, part, wanted, weight in parts:
            slope = torch.softmax(part.float(), dim=-1)
            slope[torch.arange(len(wanted), device=slope.device), wanted] -= 1
            out.copy_(slope.mul_(weight[:, None]))
        return answer, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, teacher)
        losses = []
        for part, other in zip(_chunks(logits), _chunks(teacher), strict=True):
            wanted = torch.log_softmax(other.float(), dim=-1)
            losses.append((wanted.exp() * (wanted - torch.log_softmax(part.float(), dim=-1))).sum(dim=-1))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, teacher = ctx.saved_tensors
        answer = torch.empty_like(logits)
        parts = zip(_chunks(answer), _chunks(logits), _chunks(teacher), _like(grads[0], logits), strict=True)
        for out, part, other, weight in parts:
            slope = torch.softmax(part.float(), dim=-1).sub_(torch.softmax(other.float(), dim=-1))
            out.copy_(slope.mul_(weight[:, None]))
        return answer, None


_cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _CrossEntropy.apply
_divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _Divergence.apply


def cross_entropies(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """`logits [n, vocab_size]` of any float dtype, `target_ids [n]`: `[n]` in nats, fp32; n at least 1."""
    return _cross_entropy(logits, target_ids)


def divergences(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """How far the distributions are from the teacher's: KL(teacher, student) a token, `[n]` in nats, fp32.

    No gradient flows to the teacher (Hinton et al. 2015, at temperature 1).
    """
    return _divergence(logits, teacher_logits)


def _rows_a_chunk(logits: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def _chunks(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(logits, _rows_a_chunk(logits))


def _like(values: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(values, _rows_a_chunk(logits))
