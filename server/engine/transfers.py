"""Numbers on their way between host and device, without either waiting for the other.

What goes up lies joined in one piece of pinned memory and goes in one copy. What comes down goes into pinned memory and
is waited for when it is read, not when it is asked for. Both are ordered by the device's current stream, on which all
of the engine's work is done. Torch's allocator of pinned memory gives a piece out again only when the copy that reads
it is done, so no piece is overwritten under a copy. Where the device is the CPU nothing is copied at all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_ALIGNMENT = 16
"""Bytes: what kernels read at once."""


def upload(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in the same order, in one copy.

    On the CPU the tensors share the arrays' memory: the caller leaves them alone as long as the tensors are read.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    joined = torch.empty(joined_size(arrays), dtype=torch.uint8, pin_memory=device.type == "cuda")
    join(arrays, joined)
    return cut(joined.to(device, non_blocking=True), arrays)


def joined_size(arrays: Sequence[Array]) -> int:
    """The bytes that `join` needs."""
    return sum(_aligned(array.nbytes) for array in arrays)


def join(arrays: Sequence[Array], joined: torch.Tensor) -> None:
    """Put the arrays' bytes one after another into the host's bytes `joined`."""
    target, at = joined.numpy(), 0
    for array in arrays:
        target[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at += _aligned(array.nbytes)


def cut(joined: torch.Tensor, like: Sequence[Array]) -> list[torch.Tensor]:
    """Views of joined bytes, on any device, in the shapes and types of the arrays that were joined."""
    parts, at = [], 0
    for array in like:
        dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        parts.append(joined[at : at + array.nbytes].view(dtype).view(array.shape))
        at += _aligned(array.nbytes)
    return parts


class Download:
    """Tensors on their way to the host. The device goes on meanwhile, and what it is given later is not waited for."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """On the CPU the tensors themselves are handed out by `wait`: nobody may write to them."""
        is_cuda = any(tensor.device.type == "cuda" for tensor in tensors)
        self._tensors = [self._on_the_way(tensor) for tensor in tensors]
        self._done: Any = None
        if is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors

    @staticmethod
    def _on_the_way(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return pinned.copy_(tensor, non_blocking=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
