"""Writes a Llama model folder as an unquantised GGUF file, for peers that read nothing else.

The peer then has the same weights to the last bit: bf16 ones are stored as F16, and the export fails where one of them
has no exact F16 value (below 2^-24 or above 65504; SmolLM2 has none). Needs the `gguf` package, a dependency of ours.
Refuses to know the peer, and every architecture but Llama.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open


class ExportError(RuntimeError):
    """The model cannot be written as a GGUF file without loss; the message says why."""


def write_gguf(folder: Path, path: Path) -> None:
    """Write the model in `folder` (config.json, model.safetensors, tokenizer.json) to `path`. Raises ExportError."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ExportError(f"{folder} is a {config['model_type']} model; only llama can be written")
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, config, json.loads((folder / "tokenizer.json").read_text()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            known = names.get_name(name, try_suffixes=(".weight",))
            if known is None:
                raise ExportError(f"GGUF has no name for {name}")
            writer.add_tensor(known, _stored(name, file.get_tensor(name).float().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Peers refuse a file without one; the benchmarks send token ids and never use it."""
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = [f"<unused {i}>" for i in range(config["vocab_size"])]
    for text, i in {**tokenizer["model"]["vocab"], **special}.items():
        tokens[i] = text
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _stored(name: str, weight: npt.NDArray[np.float32], config: dict[str, Any]) -> npt.NDArray[Any]:
    """Matrices as F16, vectors as F32; rows of queries and keys in the order of GGUF's interleaved rotary pairs."""
    if weight.ndim == 1:
        return weight
    if name.endswith("q_proj.weight"):
        weight = _interleaved(weight, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        weight = _interleaved(weight, config["num_key_value_heads"])
    half = weight.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), weight):
        raise ExportError(f"{name} has values that F16 does not hold exactly")
    return half


def _interleaved(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
