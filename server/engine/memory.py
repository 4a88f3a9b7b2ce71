"""How much memory keys and values get, and the ledger that hands it out."""

import os

import torch

from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.slots import SlotLedger

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
            kv_bytes = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE)
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
