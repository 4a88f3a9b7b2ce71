"""The backbone: one frozen model, resident on one device, and the way it is run.

Loads any decoder-only model that transformers loads from safetensors, freezes it, takes its fingerprint, puts it
through the gate and keeps the first way of running it that passes: packed, else dense, else it is refused. Code
shipped with a model is never run (`auto_map` is refused), and pickled weights are never read.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prompt_store.manifest import BackboneShape, ServingDtype
from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
from server.engine.fingerprint import fingerprint_folder
from server.engine.forward import DenseForward, Forward, PackedForward, UnsupportedModelError, reference_logits
from server.engine.gate import GateResult, check_forward, gate_references, gate_rows
from server.engine.kv import KeysValues, KvCache
from server.engine.plan import StepPlan

logger = logging.getLogger(__name__)

DTYPES: dict[ServingDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_STOCK_ATTENTION = "eager"


class BackboneError(RuntimeError):
    """The model cannot be served; the message says what was tried and why it failed."""


class Backbone:
    """A frozen model and its tokenizer. The engine thread alone calls `forward` and `reference`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        fingerprint: str,
        max_model_len: int | None = None,
    ) -> None:
        """Freeze `model` and put it through the gate. Raises BackboneError when it can be served in no way."""
        model.train(False)
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.hidden_size = _hidden_size(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_model_len = _context_length(model, max_model_len)
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self._context = StepContext()
        attach_context(model, self._context)
        self.path: Literal["packed", "dense"]
        self.path, self._forward, self.gate = self._choose_forward()
        self.layers = self._forward.layers

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        cache_dir: Path | None = None,
        name: str | None = None,
    ) -> "Backbone":
        """Load from a folder or a hub id. Takes seconds; blocking.

        `dtype` "auto" is bf16 where the device has the instructions, else fp32; `device` "auto" is CUDA where there is
        one. Raises BackboneError.
        """
        chosen_device = _choose_device(device)
        chosen_dtype = _choose_dtype(dtype, chosen_device)
        folder = _resolve_folder(source)
        _refuse_shipped_code(folder)
        try:
            model, tokenizer = _load_folder(folder, chosen_dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackboneError(f"{source} could not be loaded: {error}") from error
        torch.nn.Module.to(model, chosen_device)
        return cls(
            model,
            tokenizer,
            name=name or folder.name,
            fingerprint=fingerprint_folder(folder, cache_dir),
            max_model_len=max_model_len,
        )

    @property
    def dtype_name(self) -> ServingDtype:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def device_name(self) -> str:
        return str(self.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of one row takes, all layers together."""
        return KvCache.bytes_per_token(self.layers, self.dtype)

    def shape(self, max_virtual_tokens: int) -> BackboneShape:
        """What a prompt file must fit."""
        first = self.layers[0]
        uniform = all(layer == first for layer in self.layers) and first.key_dim == first.value_dim
        return BackboneShape(
            name=self.name,
            fingerprint=self.fingerprint,
            hidden_size=self.hidden_size,
            num_layers=len(self.layers),
            kv_heads=first.kv_heads if uniform else None,
            head_dim=first.key_dim if uniform else None,
            dtype=self.dtype_name,
            max_virtual_tokens=max_virtual_tokens,
            model_type=self.model.config.model_type,
        )

    @torch.inference_mode()
    def forward(self, kv: KvCache, plan: StepPlan) -> torch.Tensor:
        """Run one step. Returns the logits `[L, vocab_size]` of `plan.logits_tokens`, in the serving dtype."""
        return self._forward.run(kv, plan)

    @torch.inference_mode()
    def reference(
        self,
        token_ids: Sequence[int],
        *,
        vectors: torch.Tensor | None = None,
        prefix: KeysValues | None = None,
    ) -> torch.Tensor:
        """Logits `[len(token_ids), vocab_size]` of one row alone, by the model's own attention."""
        with self._stock_attention():
            return reference_logits(self.model, token_ids, vectors=vectors, prefix=prefix)

    @contextmanager
    def _stock_attention(self) -> Iterator[None]:
        if self.path == "dense":
            yield
            return
        self.model.set_attn_implementation(_STOCK_ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(ATTENTION_NAME)

    @torch.inference_mode()
    def _choose_forward(self) -> tuple[Literal["packed", "dense"], Forward, GateResult]:
        rows = gate_rows(self.vocab_size)
        references = gate_references(self.model, rows)
        packed_reason = self._packed_refusal()
        if packed_reason is None:
            try:
                self.model.set_attn_implementation(ATTENTION_NAME)
                packed = PackedForward(self.model, self._context)
                self._context.num_calls = 0
                result = check_forward(packed, references, rows, self.dtype, self.device)
                expected_calls = 5 * len(packed.layers)
                if result.passed and self._context.num_calls != expected_calls:
                    packed_reason = f"attention was called {self._context.num_calls} times, not {expected_calls}"
                elif result.passed:
                    return "packed", packed, result
                else:
                    packed_reason = result.reason
            except Exception as error:
                packed_reason = f"{type(error).__name__}: {error}"
            self.model.set_attn_implementation(_STOCK_ATTENTION)
        logger.warning("backbone %s is not served packed: %s", self.name, packed_reason)
        try:
            dense = DenseForward(self.model)
            result = check_forward(dense, references, rows, self.dtype, self.device)
            dense_reason = result.reason
        except UnsupportedModelError as error:
            dense_reason = str(error)
        else:
            if result.passed:
                return "dense", dense, result
        raise BackboneError(
            f"{self.name} ({self.model.config.model_type}) is refused. Packed: {packed_reason}. Dense: {dense_reason}."
        )

    def _packed_refusal(self) -> str | None:
        if not self.model._can_set_attn_implementation():
            return f"{self.model.config.model_type} does not use transformers' attention interface"
        return None


def _hidden_size(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[1])


def _context_length(model: PreTrainedModel, wanted: int | None) -> int:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = min((int(limit) for limit in limits if limit), default=2048)
    return min(known, wanted) if wanted is not None else known


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    generation: Any = getattr(model, "generation_config", None)
    for source in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if source is not None:
            ids.update(source if isinstance(source, list | tuple) else [source])
    return frozenset(int(i) for i in ids)


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"unknown device {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {device} was asked for, but torch sees no CUDA device")
    return chosen


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    for name, chosen in DTYPES.items():
        if dtype == name:
            return chosen
    if dtype != "auto":
        raise BackboneError(f"unknown dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-bf16 or AMX); elsewhere bf16 is emulated and slower than fp32."""
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(bool(check()) for check in checks if check is not None)


def _resolve_folder(source: str) -> Path:
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


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, and its tokenizer. Raises ValueError, or what transformers raises, when it is unfit."""
    if getattr(AutoConfig.from_pretrained(folder), "is_encoder_decoder", False):
        raise ValueError("it is an encoder-decoder model; promptmux serves decoder-only models")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, attn_implementation=_STOCK_ATTENTION, output_loading_info=True
    )
    model, loading = loaded
    # transformers fills what a checkpoint lacks with random numbers and only logs it.
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}")
    return model, AutoTokenizer.from_pretrained(folder)


def _refuse_shipped_code(folder: Path) -> None:
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
