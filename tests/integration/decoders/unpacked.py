"""Architectures that are served by the dense path, and those that are refused."""

from tests.factories import CONFIGS, HIDDEN_SIZE, NUM_LAYERS, SLIDING_WINDOW
from tests.integration.decoders.ingredients import (
    ALTERNATING,
    EXPERTS,
    GPT2,
    GROUPED,
    LATENT,
    LINEAR,
    MAMBA2,
    ROUTED,
    SLIDING,
    UNGROUPED,
    WIDE,
    Table,
)

DENSE: Table = {
    "gptj": ("parallel block, partly rotary", CONFIGS["gptj"]),
    "codegen": ("parallel block, fused projections in an order of its own", CONFIGS["gptj"]),
    "gpt_neo": (
        "learned positions, local attention every other layer",
        {
            "vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_layers": 2, "num_heads": 4,
            "max_position_embeddings": 512, "attention_types": [[["global", "local"], 1]],
            "window_size": SLIDING_WINDOW,
        },
    ),
    "gpt_neox_japanese": ("biases outside the projections", UNGROUPED),
    "bloom": ("distance biases (ALiBi)", CONFIGS["bloom"]),
    "mpt": (
        "distance biases (ALiBi)",
        {"vocab_size": 128, "d_model": HIDDEN_SIZE, "n_layers": NUM_LAYERS, "n_heads": 4, "max_seq_len": 512},
    ),
    "falcon": ("one key head, parallel block", CONFIGS["falcon"]),
    "falcon (rw)": ("distance biases (ALiBi)", CONFIGS["falcon"] | {"alibi": True, "multi_query": False}),
    "falcon (40b)": (
        "grouped queries, two norms before a parallel block",
        CONFIGS["falcon"] | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "xglm": (
        "sinusoidal positions, shifted by two",
        {
            "vocab_size": 128, "d_model": HIDDEN_SIZE, "ffn_dim": 64, "num_layers": NUM_LAYERS, "attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "phimoe (window)": (
        "a sliding window that only its mask knows",
        GROUPED | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe (window)": (
        "a sliding window that only its mask knows",
        GROUPED | SLIDING
        | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_window_layers": 1,
            "shared_expert_intermediate_size": 16, "use_sliding_window": True,
        },
    ),
    "hrm_text": ("layers that run several times", WIDE),
    "diffllama": ("the difference of two attentions", WIDE),
    "doge": ("masks computed from values", GROUPED),
    "llama4_text (chunks)": (
        "attention cut into chunks shorter than the rows",
        WIDE | {
            "num_local_experts": 4, "no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 64, "attention_chunk_size": 8,
        },
    ),
}  # fmt: skip

REFUSED: Table = {
    "mamba": ("state-space model", {"vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2}),
    "falcon_mamba": (
        "state-space model",
        {"vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2, "state_size": 4},
    ),
    "mamba2": (
        "state-space model",
        {
            "vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
            "state_size": 8, "n_groups": 1, "chunk_size": 8,
        },
    ),
    "rwkv": (
        "recurrent",
        {"vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2, "attention_hidden_size": HIDDEN_SIZE},
    ),
    "jamba": (
        "state-space hybrid",
        GROUPED | {
            "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
            "mamba_dt_rank": 4, "mamba_d_state": 4, "use_mamba_kernels": False,
        },
    ),
    "bamba": ("state-space hybrid", GROUPED | MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": ("state-space hybrid", GROUPED | MAMBA2 | {"mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "state-space hybrid",
        GROUPED | EXPERTS | MAMBA2
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "shared_intermediate_size": 16},
    ),
    "nemotron_h": (
        "state-space hybrid",
        GROUPED | {
            "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16,
            "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        },
    ),
    "recurrent_gemma": (
        "recurrent hybrid",
        GROUPED | {
            "num_key_value_heads": 1, "block_types": ["recurrent", "attention"], "lru_width": HIDDEN_SIZE,
            "attention_window_size": SLIDING_WINDOW,
        },
    ),
    "lfm2": ("convolution hybrid", GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2_moe": (
        "convolution hybrid",
        GROUPED | EXPERTS
        | {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "kimi_linear": (
        "linear attention hybrid",
        LATENT | LINEAR
        | {
            "q_lora_rank": None, "head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 2, "num_experts": 4,
            "num_experts_per_token": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "zamba2": (
        "state-space hybrid",
        UNGROUPED | {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "mamba_d_state": 8,
            "n_mamba_heads": 4, "mamba_headdim": 16, "attention_head_dim": 16, "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zaya": (
        "convolutions before attention",
        WIDE | {"num_experts": 2, "moe_intermediate_size": 16, "router_hidden_size": 8},
    ),
    "qwen3_next": ("linear attention hybrid", WIDE | LINEAR | ROUTED | {"shared_expert_intermediate_size": 16}),
    "qwen3_5_text": ("linear attention hybrid", WIDE | LINEAR),
    "qwen3_5_moe_text": (
        "linear attention hybrid",
        WIDE | LINEAR | ROUTED | {"shared_expert_intermediate_size": 16},
    ),
    "olmo_hybrid": ("linear attention hybrid", GROUPED | LINEAR),
    "minimax": (
        "lightning attention hybrid",
        WIDE | EXPERTS | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "deepseek_v32": (
        "an index of its own chooses the keys",
        LATENT | ROUTED | {"head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    ),
    "glm_moe_dsa": (
        "an index of its own chooses the keys",
        LATENT | ROUTED | {"head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    ),
    "inkling_text": (
        "distance biases that are learned, convolutions",
        WIDE | ROUTED
        | {
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 6,
            "d_rel": 4, "rel_extent": 16, "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "doge (window)": ("keeps a few keys, chosen by their values", GROUPED | {"keep_window_size": SLIDING_WINDOW}),
    "gemma3n_text": (
        "embeddings a layer, looked up by token id; layers that share keys and values",
        WIDE
        | {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4_text (per layer)": (
        "embeddings a layer, looked up by token id",
        WIDE | ALTERNATING | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    ),
    "bert": ("an encoder: every token sees every other", UNGROUPED),
    "openai-gpt": ("keeps no keys and values", GPT2),
    "xlnet": ("two streams of attention", {"vocab_size": 128, "d_model": HIDDEN_SIZE, "n_layer": 2, "n_head": 4}),
    "bart": (
        "the decoder of an encoder-decoder model",
        {
            "vocab_size": 128, "d_model": HIDDEN_SIZE, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
}  # fmt: skip
