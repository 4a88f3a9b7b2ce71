"""How much memory keys and values get, and the ledgers that hand it out."""

import os
from pathlib import Path

import torch

from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KvCache
from server.engine.slots import SlotLedger

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

SLAB_BYTES = 256 << 20
CPU_MEMORY_SHARE = 0.25
CUDA_MEMORY_SHARE = 0.6


def make_ledger(backbone: Backbone, config: EngineConfig) -> SlotLedger:
    """A ledger over `config.kv_cache_bytes`, or over a share of the device's memory where that is None.

    Raises ValueError when that holds no row of the backbone's context length.
    """
    kv_bytes = config.kv_cache_bytes
    if kv_bytes is None:
        if backbone.device.type == "cuda":
            kv_bytes = int(torch.cuda.mem_get_info(backbone.device)[0] * CUDA_MEMORY_SHARE)
        else:
            kv_bytes = int(_memory_limit_bytes() * CPU_MEMORY_SHARE)
    budget_tokens = kv_bytes // backbone.bytes_per_token
    if budget_tokens < backbone.max_model_len:
        raise ValueError(
            f"kv_cache_bytes={kv_bytes} holds {budget_tokens} tokens of this backbone, fewer than one row of "
            f"max_model_len={backbone.max_model_len}: lower max_model_len or raise kv_cache_bytes"
        )
    return SlotLedger(
        max_tokens=backbone.max_model_len,
        budget_tokens=budget_tokens,
        slab_tokens=max(1, SLAB_BYTES // backbone.bytes_per_token),
        max_slots_per_slab=config.max_rows,
    )


def make_scratch(backbone: Backbone, config: EngineConfig) -> KvCache:
    """One slot, outside the budget, in which prompts of up to `config.max_virtual_tokens` are compiled one by one."""
    max_tokens = min(config.max_virtual_tokens, backbone.max_model_len)
    ledger = SlotLedger(
        max_tokens=max_tokens,
        budget_tokens=SlotLedger.capacity_for(max_tokens, max_tokens),
        slab_tokens=1,
        max_slots_per_slab=1,
    )
    return KvCache(
        backbone.layers,
        ledger,
        dtype=backbone.dtype,
        device=backbone.device,
        poison_freed=config.poison_freed_slots,
    )


def _memory_limit_bytes() -> int:
    """The machine's memory, or the container's limit where that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not that version of cgroups, or "max"
            continue
    return min(limits)
