"""What the configurations of tiny models are put together from."""

from typing import Any

from tests.factories import CONFIGS, SLIDING_WINDOW

Config = dict[str, Any]
Table = dict[str, tuple[str, Config]]
"""Name → what is peculiar about it, and its configuration. A name's first word is transformers' model type."""

GROUPED: Config = CONFIGS["llama"]
UNGROUPED: Config = CONFIGS["gpt_neox"]
GPT2: Config = CONFIGS["gpt2"]
WIDE: Config = {**GROUPED, "head_dim": 16}
SLIDING: Config = {"sliding_window": SLIDING_WINDOW}
ALTERNATING: Config = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: Config = {
    "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: Config = {
    **UNGROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
MAMBA2: Config = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
LINEAR: Config = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
