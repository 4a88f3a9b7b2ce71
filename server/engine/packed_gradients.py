"""The packed product as autograd sees it: differentiable in its input, never in its weights.

Serving asks for no gradient and never comes here; a prompt that is being trained does. The forward product is the very
one that serves. Its gradient needs the weights as torch keeps them: they are unpacked for one layer at a time and not
kept, so that training holds no second copy of the backbone; of a large head, a part at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from server.engine.packed_weights import PlainProjections, Projections


def multiply_with_gradient(projections: Projections, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """As `projections.multiply`, part of the graph of `rows [..., K]`."""
    if isinstance(projections, PlainProjections):
        return projections.multiply(rows)
    answers: Sequence[torch.Tensor] = _Product.apply(rows, projections)  # type: ignore[no-untyped-call]
    return answers


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, projections: Projections) -> tuple[torch.Tensor, ...]:
        ctx.projections = projections
        # A sibling whose answer nobody used costs no product of zeros.
        ctx.set_materialize_grads(False)
        return tuple(projections.multiply(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        projections: Projections = ctx.projections
        given = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if not given:
            return None, None
        parts = [gradient for gradient in gradients if gradient is not None]
        joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if len(given) < len(gradients):
            weight = torch.cat([projections.weight(place) for place in given])
            return torch.matmul(joined, weight.to(joined.dtype)), None
        total: torch.Tensor | None = None
        for start, tile in projections.tiles():
            product = torch.matmul(joined[..., start : start + len(tile)], tile.to(joined.dtype))
            total = product if total is None else total.float() + product
        assert total is not None
        return total.to(joined.dtype), None
