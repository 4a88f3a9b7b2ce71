"""Small real things for tests: random backbones of many architectures, and prompts that PEFT itself made and saved.

Everything is made from fixed seeds and written to a folder that the caller names; nothing is downloaded. Refuses to
know what is tested with it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from prompt_store.formats import check_file
from prompt_store.manifest import BackboneShape, SoftPrompt
from server.engine.request import PromptRef

TEST_DEVICE = os.environ.get("ENGINE_TEST_DEVICE", "cpu")
"""Where the engine's and the isolation tests have their backbones."""

VOCAB_SIZE = 128
NUM_LAYERS = 3
HIDDEN_SIZE = 32
SLIDING_WINDOW = 6
CONTEXT_LENGTH = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT_LENGTH,
}
_UNGROUPED: dict[str, Any] = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_GPT2_STYLE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": HIDDEN_SIZE,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": CONTEXT_LENGTH,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": SLIDING_WINDOW},
    "mixtral": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": _COMMON | {"head_dim": 16, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16},
    "gpt2": _GPT2_STYLE,
    "gpt_neox": _UNGROUPED,
    "opt": _UNGROUPED | {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN_SIZE},
    "phi": _COMMON,
    "starcoder2": _COMMON,
    "gpt_oss": _COMMON
    | {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
    },
    "gptj": _GPT2_STYLE | {"rotary_dim": 4},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 4},
    "falcon": _UNGROUPED,
}
"""Architectures as transformers calls them, with what makes each differ: grouped queries, windows, experts, sinks."""

PREFIX_OVERRIDES: dict[str, dict[str, Any]] = {
    # PEFT does not know falcon's name for its one shared head and would size a prefix for all query heads.
    "falcon": {"num_attention_heads": 1, "token_dim": HIDDEN_SIZE // 4},
}
"""What PEFT must be told of a family to make prefixes that fit it."""


def save_tiny_backbone(
    family: str, folder: Path, *, seed: int = 0, config_fields: Mapping[str, Any] | None = None
) -> Path:
    """Save a random fp32 model of the family with a tokenizer; returns its folder.

    `config_fields` replace the family's entry in `CONFIGS`. Weights are drawn wide enough that logits are far from
    flat: tokens differ by whole nats. Biases and sinks are drawn too, so that leaving one out does not go unnoticed.
    """
    fields = CONFIGS[family] if config_fields is None else config_fields
    config = AutoConfig.for_model(family, **fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(("bias", "sinks", "scale")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `VOCAB_SIZE` tokens: four special ones, then single characters; it splits nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet[: VOCAB_SIZE - len(specials)]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def peft_config(
    kind: str, k: int, *, prompt_fields: Mapping[str, Any] | None = None, **prefix_fields: Any
) -> peft.PeftConfig:
    """PEFT's configuration for one of `PROMPT_KINDS` with k virtual tokens.

    `prompt_fields` are for prompt tuning and P-tuning, `prefix_fields` for prefixes.
    """
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": k}
    if kind == "prompt_tuning":
        return peft.PromptTuningConfig(**common, **(prompt_fields or {}))
    if kind == "p_tuning":
        return peft.PromptEncoderConfig(encoder_hidden_size=24, **common, **(prompt_fields or {}))
    if kind == "cpt":
        return peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[5 + i % 64 for i in range(k)],
            cpt_mask=[1] * k,
            cpt_tokens_type_mask=[1 + i % 4 for i in range(k)],
        )
    if kind == "multitask":
        return peft.MultitaskPromptTuningConfig(num_tasks=NUM_TASKS, num_ranks=2, **common)
    if kind == "prefix":
        return peft.PrefixTuningConfig(**common, **prefix_fields)
    if kind == "prefix_projection":
        return peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=24, **common, **prefix_fields)
    if kind == "cartridge":
        return peft.CartridgeConfig(num_frozen_tokens=min(2, k), **common, **prefix_fields)
    raise ValueError(f"unknown kind of prompt {kind!r}")


PROMPT_KINDS = ("prompt_tuning", "p_tuning", "cpt", "multitask", "prefix", "prefix_projection", "cartridge")
NUM_TASKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePrompt:
    """A prompt on disk as PEFT saved it, and as the store reads it. `task_index` is set for multi-task files alone."""

    name: str
    kind: str
    folder: Path
    task_index: int | None
    ref: PromptRef
    soft_prompt: SoftPrompt


def save_prompt(
    model_folder: Path,
    kind: str,
    k: int,
    folder: Path,
    *,
    seed: int,
    scale: float = 0.5,
    base: PreTrainedModel | None = None,
    first_text: Sequence[int] = (),
    prompt_fields: Mapping[str, Any] | None = None,
    **prefix_fields: Any,
) -> Path:
    """Let PEFT build a prompt of the kind on the model, add noise of `scale` to all its numbers, and save it.

    `base` is the model of `model_folder` where the caller has it loaded already; PEFT does not change it. With
    `first_text` (at least k token ids) a prefix without projection begins as the keys and values of that text, as
    trained ones do, and not as PEFT's own wide noise.
    """
    if base is None:
        base = load_model(model_folder)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft_config(kind, k, prompt_fields=prompt_fields, **prefix_fields))
    with torch.no_grad():
        if first_text and kind in ("prefix", "cartridge"):
            _begin_as_text(model.prompt_encoder["default"], base, first_text[:k])
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    model.eval().save_pretrained(str(folder))
    return folder


def _begin_as_text(encoder: Any, base: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Fill a prefix encoder with the text's keys and values, `[k, layers * 2 * kv_dim]`, alternating by layer."""
    cache = DynamicCache()
    base(input_ids=torch.tensor([list(token_ids)]), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    parts = [tensor[0].transpose(0, 1).flatten(1) for layer in layers for tensor in (layer.keys, layer.values)]
    flat = torch.cat(parts, dim=1)
    if hasattr(encoder, "load_prompt_embeddings"):
        encoder.load_prompt_embeddings(flat)
    else:
        encoder.embedding.weight.copy_(flat)


def load_model(folder: Path) -> PreTrainedModel:
    """The model in fp32 with transformers' plainest attention, untouched by promptmux."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.train(False)
    return model


def read_prompt(
    name: str, folder: Path, shape: BackboneShape, *, task_index: int | None = None, tenant: str = "default"
) -> MadePrompt:
    """Read a folder that PEFT wrote the way the store does. Raises PromptStoreError."""
    file_bytes = (folder / "adapter_model.safetensors").read_bytes()
    config_bytes = (folder / "adapter_config.json").read_bytes()
    checked = check_file(file_bytes, config_bytes, backbone=shape, task_index=task_index)
    ref = PromptRef(
        tenant=tenant,
        task=name,
        version=1,
        digest=checked.digest,
        prefix_key=checked.prefix_key,
        kind=checked.kind,
        num_virtual_tokens=checked.num_virtual_tokens,
    )
    return MadePrompt(
        name=name,
        kind=str(json.loads(config_bytes)["peft_type"]),
        folder=folder,
        task_index=task_index,
        ref=ref,
        soft_prompt=checked.soft_prompt,
    )
