"""How much memory keys and values get."""

import os
from pathlib import Path

import torch

from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KvPool, num_pages_for
from server.engine.pages import PAGE_SIZE

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

CPU_MEMORY_SHARE = 0.25
CUDA_MEMORY_SHARE = 0.6


def make_pool(backbone: Backbone, config: EngineConfig) -> KvPool:
    """A pool of `config.kv_cache_bytes` for rows (a share of the device's memory where that is None) and
    `config.prefix_cache_bytes` for prompts.

    A prompt's last columns, too few for a page, lie outside the pool, but count among `prefix_cache_bytes`. How many
    bytes are pages and how many are tails depends on the prompts' lengths alone, so either may come to be all of them.
    On CPU pages cost memory only once they are used; on CUDA there must be room for both before rows get their share.

    Raises ValueError when that holds no row of the backbone's context length, or no two of the longest prompts.
    """
    kv_bytes = config.kv_cache_bytes
    if kv_bytes is None:
        kv_bytes = default_kv_bytes(backbone.device, config.prefix_cache_bytes)
    page_bytes = backbone.bytes_per_token * PAGE_SIZE
    row_pages = kv_bytes // page_bytes
    needed = num_pages_for(backbone.max_model_len)
    if row_pages < needed:
        raise ValueError(
            f"kv_cache_bytes={kv_bytes} holds {row_pages} pages of {PAGE_SIZE} tokens of this backbone, fewer than the "
            f"{needed} of one row of max_model_len={backbone.max_model_len}: lower max_model_len or raise "
            "kv_cache_bytes"
        )
    longest = num_pages_for(min(config.max_virtual_tokens, backbone.max_model_len))
    prefix_pages = config.prefix_cache_bytes // page_bytes
    if prefix_pages < 2 * longest:
        raise ValueError(
            f"prefix_cache_bytes={config.prefix_cache_bytes} holds {prefix_pages} pages of {PAGE_SIZE} tokens of this "
            f"backbone, fewer than the {2 * longest} of two prompts of max_virtual_tokens="
            f"{config.max_virtual_tokens}: lower max_virtual_tokens or raise prefix_cache_bytes"
        )
    return KvPool(
        backbone.layers,
        row_pages=row_pages,
        prefix_pages=prefix_pages,
        dtype=backbone.dtype,
        device=backbone.device,
        poison_freed=config.poison_freed_pages,
    )


def default_kv_bytes(device: torch.device, prefix_cache_bytes: int) -> int:
    """The rows' share of the device's memory, where nothing else is said."""
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0] - 2 * prefix_cache_bytes
        return int(max(0, free_bytes) * CUDA_MEMORY_SHARE)
    return int(_memory_limit_bytes() * CPU_MEMORY_SHARE)


def _memory_limit_bytes() -> int:
    """The machine's memory, or the container's limit where that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not that version of cgroups, or "max"
            continue
    return min(limits)
