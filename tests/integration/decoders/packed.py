"""Architectures that are served packed: all of a step's tokens in one sequence."""

from tests.factories import CONFIGS, HIDDEN_SIZE, NUM_LAYERS, SLIDING_WINDOW
from tests.integration.decoders.ingredients import (
    ALTERNATING,
    EXPERTS,
    GPT2,
    GROUPED,
    LATENT,
    MAMBA2,
    ROUTED,
    SLIDING,
    UNGROUPED,
    WIDE,
    Table,
)

PACKED: Table = {
    "llama": (
        "grouped queries, rotary frequencies scaled by parts",
        GROUPED | {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama (dynamic)": (
        "rotary frequencies that change with the longest row: served up to there",
        GROUPED | {
            "rope_parameters": {
                "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": ("sliding window", GROUPED | SLIDING),
    "mixtral": ("experts, sliding window", GROUPED | SLIDING | EXPERTS),
    "ministral": ("sliding window every other layer", WIDE | ALTERNATING),
    "ministral3": (
        "queries scaled by position",
        WIDE | {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0,
            }
        },
    ),
    "qwen2": (
        "biases of queries, keys and values; the last layers have a sliding window",
        GROUPED | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "experts beside a shared one, a dense layer",
        GROUPED | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "mlp_only_layers": [0],
        },
    ),
    "qwen3": (
        "norm of queries and keys, heads wider than the model; the last layers have a sliding window",
        WIDE | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3_moe": ("experts, norm of queries and keys", WIDE | {"num_experts": 4} | EXPERTS),
    "gemma": ("one key head, scaled embeddings, heads wider than the model", WIDE | {"num_key_value_heads": 1}),
    "gemma2": (
        "soft caps, sliding window every other layer",
        WIDE | ALTERNATING
        | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": (
        "sliding window every other layer, two rotary bases",
        WIDE | ALTERNATING | {"query_pre_attn_scalar": 16},
    ),
    "gemma4_text": (
        "full layers with wider heads, sliding window every other layer",
        WIDE | ALTERNATING | {"hidden_size_per_layer_input": 0},
    ),
    "vaultgemma": ("soft caps, sliding window every other layer", WIDE | ALTERNATING | {"query_pre_attn_scalar": 16}),
    "gpt2": ("learned positions", GPT2),
    "gpt_bigcode": ("learned positions, one key head", GPT2),
    "gpt_bigcode (heads)": ("learned positions", GPT2 | {"multi_query": False}),
    "gpt_neox": ("parallel block, partly rotary", UNGROUPED),
    "gpt_neox (serial)": ("partly rotary", UNGROUPED | {"use_parallel_residual": False}),
    "opt": ("learned positions, shifted by two", CONFIGS["opt"]),
    "opt (350m)": (
        "embeddings narrower than the model, norms after the block",
        CONFIGS["opt"] | {"word_embed_proj_dim": HIDDEN_SIZE // 2, "do_layer_norm_before": False},
    ),
    "biogpt": ("learned positions, shifted by two", UNGROUPED),
    "ctrl": (
        "sinusoidal positions",
        {"vocab_size": 128, "n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 512, "dff": 64},
    ),
    "phi": ("parallel block, partly rotary, norm of queries and keys", GROUPED | {"qk_layernorm": True}),
    "phi3": ("fused projections, sliding window, partly rotary", GROUPED | SLIDING | {"partial_rotary_factor": 0.5}),
    "phi3 (longrope)": (
        "rotary frequencies that change with the longest row: served up to there",
        GROUPED | {
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
                "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        },
    ),
    "phimoe": ("experts chosen by a sparse mixer", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("sliding window, biases everywhere", GROUPED | SLIDING),
    "olmo": ("norms without weights, clipped queries, keys and values", GROUPED | {"clip_qkv": 0.5}),
    "olmo2": ("norms after the block", GROUPED),
    "olmo3": ("sliding window every other layer, norms after the block", GROUPED | ALTERNATING),
    "olmoe": ("experts, norm of queries and keys", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("experts, norms after the block", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("parallel block, scaled logits, norm of queries and keys", GROUPED | {"use_qk_norm": True}),
    "cohere2": ("parallel block; windowed layers with positions, full ones without", GROUPED | ALTERNATING),
    "cohere2_moe": ("experts; windowed layers with positions, full ones without", GROUPED | ALTERNATING | EXPERTS),
    "granite": (
        "multipliers of embeddings, residuals, attention and logits",
        GROUPED | {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0,
        },
    ),
    "granitemoe": ("experts, multipliers", GROUPED | EXPERTS | {"attention_multiplier": 0.2}),
    "granitemoeshared": (
        "experts beside a shared one",
        GROUPED | EXPERTS | {"shared_intermediate_size": 16, "attention_multiplier": 0.2},
    ),
    "granite_swa": ("sinks, sliding window", GROUPED | ALTERNATING | {"attention_multiplier": 0.2}),
    "granitemoe_swa": (
        "experts, sinks, sliding window",
        GROUPED | ALTERNATING | EXPERTS | {"attention_multiplier": 0.2},
    ),
    "glm": ("partly rotary, interleaved", WIDE),
    "glm4": ("norms before and after the block, partly rotary", WIDE),
    "glm4_moe": ("experts beside a shared one, partly rotary", WIDE | ROUTED),
    "glm4_moe_lite": ("latent attention (values as wide as keys), experts", LATENT | ROUTED | {"v_head_dim": 16}),
    "smollm3": ("a layer without positions", GROUPED | {"no_rope_layers": [1, 0, 1]}),
    "exaone4": ("windowed layers with positions, full ones without", GROUPED | ALTERNATING),
    "exaone_moe": (
        "experts; windowed layers with positions, full ones without",
        GROUPED | ALTERNATING | ROUTED | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "gpt_oss": ("sinks, experts, sliding window every other layer", CONFIGS["gpt_oss"]),
    "llama4_text": (
        "experts, a layer without positions, norm of queries and keys",
        WIDE | {"num_local_experts": 4, "no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 64},
    ),
    "stablelm": (
        "partly rotary, norms of single heads, parallel block",
        GROUPED | {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "nemotron": ("partly rotary, squared ReLU", WIDE),
    "deepseek_v2": ("latent attention, experts", LATENT | ROUTED | {"topk_method": "greedy"}),
    "deepseek_v3": ("latent attention (wider keys than values), experts by groups", LATENT | ROUTED),
    "axk1": ("latent attention, experts", LATENT | ROUTED | {"head_dim": 8}),
    "minicpm3": ("latent attention, scaled depth", LATENT),
    "youtu": ("latent attention", LATENT),
    "longcat_flash": (
        "latent attention, two a layer; experts that do nothing",
        {
            **LATENT, "head_dim": 8, "num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16,
            "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2,
        },
    ),
    "dots1": ("experts beside a shared one, norm of queries and keys", GROUPED | ROUTED),
    "ernie4_5": ("interleaved rotary", WIDE),
    "ernie4_5_moe": (
        "experts beside shared ones",
        GROUPED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "hunyuan_v1_dense": ("norm of queries and keys after rotation", WIDE),
    "hunyuan_v1_moe": (
        "experts beside a shared one",
        WIDE | {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 16, "num_shared_expert": 1},
    ),
    "seed_oss": ("biases of queries, keys and values", WIDE),
    "arcee": ("squared ReLU", WIDE),
    "apertus": ("xIELU, norm of queries and keys", GROUPED),
    "helium": ("interleaved rotary", GROUPED | {"head_dim": 8}),
    "persimmon": ("norm of queries and keys, partly rotary, squared ReLU", UNGROUPED),
    "minimax_m2": ("experts, norm of queries and keys, partly rotary", WIDE | EXPERTS),
    "minimax_m3_vl_text": (
        "experts, partly rotary, no layer with chosen blocks",
        WIDE | EXPERTS | {"index_head_dim": 16, "index_n_heads": 2, "rotary_dim": 8},
    ),
    "mimo_v2_flash": (
        "sinks, windowed layers with other key heads, wider keys than values",
        WIDE | ALTERNATING | ROUTED
        | {"v_head_dim": 8, "head_dim": 16, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "bitnet": ("norms inside attention and feed-forward, squared ReLU", GROUPED),
    "nanochat": ("norms without weights, capped logits, squared ReLU", GROUPED),
    "jais2": ("biases everywhere, squared ReLU", WIDE),
    "jetmoe": (
        "experts in attention too",
        {
            "vocab_size": 128, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS, "num_key_value_heads": 2,
            "kv_channels": 16, "intermediate_size": 64, "max_position_embeddings": 512, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "modernbert-decoder": (
        "sliding window every other layer, norms before the block",
        UNGROUPED | {**ALTERNATING, "local_attention": 2 * SLIDING_WINDOW},
    ),
    "cwm": ("sliding window every other layer", WIDE | ALTERNATING),
    "afmoe": (
        "gated attention; windowed layers with positions, full ones without; experts",
        WIDE | ALTERNATING | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "aria_text": ("experts beside shared ones", WIDE | {"moe_num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("multipliers", WIDE),
    "solar_open": ("experts beside a shared one", WIDE | ROUTED),
    "hy_v3": ("experts beside a shared one, norm of queries and keys", WIDE | ROUTED),
    "mellum": ("experts; sliding window every other layer, two rotary bases", WIDE | ALTERNATING | EXPERTS),
    "flint": ("gated attention, experts, sliding window every other layer", WIDE | ALTERNATING | ROUTED),
    "beam": (
        "windowed layers with positions, full ones without; experts by groups",
        WIDE | ALTERNATING | ROUTED | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "laguna": (
        "gated attention, experts, sliding window every other layer",
        WIDE | ALTERNATING | ROUTED
        | {
            "shared_expert_intermediate_size": 16, "num_attention_heads_per_layer": [4, 8, 4],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "kolibri1": ("experts, sliding window", WIDE | ALTERNATING | ROUTED),
    "dbrx": (
        "experts, clipped queries, keys and values",
        {
            "vocab_size": 128, "d_model": HIDDEN_SIZE, "n_heads": 4, "n_layers": NUM_LAYERS, "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": HIDDEN_SIZE, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "granitemoehybrid (attention alone)": (
        "the hybrid's configuration with no state-space layer",
        GROUPED | EXPERTS | MAMBA2
        | {"layer_types": ["full_attention"] * NUM_LAYERS, "shared_intermediate_size": 16},
    ),
    "lfm2 (attention alone)": (
        "the hybrid's configuration with no convolution",
        GROUPED | {"layer_types": ["full_attention"] * NUM_LAYERS},
    ),
}  # fmt: skip
