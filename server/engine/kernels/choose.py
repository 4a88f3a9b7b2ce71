"""Picks the attention kernel for a device: Triton on CUDA, C++ on CPU, and plain torch where neither can be had."""

import functools
import logging
from typing import Literal

import torch

from server.engine.attention import Kernel
from server.engine.kernels.gather import gather_attention
from server.engine.kernels.native import NativeUnavailableError, load_native, native_attention

logger = logging.getLogger(__name__)

KernelName = Literal["native", "triton", "gather"]


def choose_kernel(device: torch.device, *, is_deterministic: bool = False) -> tuple[KernelName, Kernel]:
    """The fastest kernel that works here. May compile C++ for half a minute, once a machine; blocking.

    `is_deterministic`: one whose answer for a row depends on nothing but the row.
    """
    if device.type == "cuda":
        from server.engine.kernels.triton_attention import triton_attention

        # By default it divides a row's columns by how many rows there are, and the order of its sums with them.
        return "triton", functools.partial(triton_attention, num_splits=1) if is_deterministic else triton_attention
    if device.type == "cpu":
        try:
            load_native()
        except NativeUnavailableError as error:
            logger.warning("attention runs in plain torch, slowly: %s", error)
        else:
            return "native", native_attention
    return "gather", gather_attention
