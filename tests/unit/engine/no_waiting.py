"""Raises where a host would wait for its device, seen on the CPU: whatever needs a tensor's value, or its size of it.

What it knows is what torch documents to synchronise: reading a number (`item`, `tolist`, `bool`, `numpy`), and results
whose shape depends on values (`nonzero`, masks as indices, `unique`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_READING_METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class WaitedError(AssertionError):
    """The host would have waited for the device."""


class _Guard(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
        is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in _READING_OPERATORS or is_mask:
            raise WaitedError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(*, numpy_of_the_host: bool = False) -> Iterator[None]:
    """Within it, WaitedError is raised by whatever would wait.

    `numpy_of_the_host`: `numpy` is asked of the host's own tensors alone, as staging memory is.
    """
    with pytest.MonkeyPatch.context() as patch, _Guard():
        for name in _READING_METHODS:
            if name != "numpy" or not numpy_of_the_host:
                patch.setattr(torch.Tensor, name, _refuse(name))
        yield


def _refuse(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise WaitedError(f"Tensor.{name} waits for the device")

    return refuse
