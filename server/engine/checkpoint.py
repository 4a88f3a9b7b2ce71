"""Finds a backbone's folder and reads it: which device, which dtype, which files, and what is refused.

Code shipped with a model is never run (`auto_map` is refused), and pickled weights are never read. Knows nothing of how
the model is served.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prompt_store.manifest import ServingDtype

DTYPES: dict[ServingDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

STOCK_ATTENTION = "eager"
"""transformers' plainest attention, by which references are computed."""


class BackboneError(RuntimeError):
    """The model cannot be served; the message says what was tried and why it failed."""


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"unknown device {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {device} was asked for, but torch sees no CUDA device")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    for name, chosen in DTYPES.items():
        if dtype == name:
            return chosen
    if dtype != "auto":
        raise BackboneError(f"unknown dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-bf16 or AMX); elsewhere bf16 is emulated and slower than fp32."""
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(bool(check()) for check in checks if check is not None)


def resolve_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")):
        raise BackboneError(f"{source} is not a model folder")
    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except Exception as error:
        raise BackboneError(f"{source} is neither a folder nor a hub id that can be fetched: {error}") from error


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, and its tokenizer. Raises ValueError, or what transformers raises, when it is unfit.

    Weights that the checkpoint holds quantised come as transformers brings them: in their own format where the machine
    runs it, else widened to `dtype`.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it is an encoder-decoder model; promptmux serves decoder-only models")
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=STOCK_ATTENTION, output_loading_info=True
        )
    except ImportError as error:
        if method is None:
            raise
        # Every format has packages of its own; transformers says which.
        raise ValueError(f"its weights are quantised ({method}), and that cannot be read here: {error}") from error
    model, loading = loaded
    if isinstance(getattr(model.config, "quantization_config", None), dict):
        # What transformers understands it replaces by an object, or drops once the weights are widened.
        raise ValueError(f"its weights are quantised ({method}), which this version of transformers does not know")
    # transformers fills what a checkpoint lacks with random numbers and only logs it.
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}")
    return model, AutoTokenizer.from_pretrained(folder)


def refuse_shipped_code(folder: Path) -> None:
    """Raises BackboneError when the model or its tokenizer names code of its own.

    Both files are looked at: for a tokenizer's `auto_map`, transformers asks the terminal whether to run the code.
    """
    if not (folder / "config.json").exists():
        raise BackboneError(f"{folder} has no config.json")
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        try:
            config = json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise BackboneError(f"{file} is not JSON: {error}") from error
        if "auto_map" in config:
            raise BackboneError(f"{folder} ships its own code (auto_map in {file.name}); promptmux runs none")
