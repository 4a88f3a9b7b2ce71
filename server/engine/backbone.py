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
from server.engine.gate import NUM_PASSES, GateResult, check_forward, gate_references, gate_rows
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
        num_logits: int | None = None,
    ) -> torch.Tensor:
        """Logits of one row alone, by the model's own attention: of all its tokens or of the last `num_logits`."""
        with self._stock_attention():
            return reference_logits(self.model, token_ids, vectors=vectors, prefix=prefix, num_logits=num_logits)

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
        try:
            packed, result = self._try_packed(references, rows)
        except UnsupportedModelError as error:
            packed_reason = str(error)
        except Exception as error:
            packed_reason = f"{type(error).__name__}: {error}"
        else:
            return "packed", packed, result
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

    def _try_packed(
        self, references: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]
    ) -> tuple[PackedForward, GateResult]:
        """Raises UnsupportedModelError when the model cannot be run packed, or fails the gate."""
        config = self.model.config.get_text_config()
        if not self.model._can_set_attn_implementation():
            raise UnsupportedModelError(f"{config.model_type} does not use transformers' attention interface")
        # The next two are asked outright: the gate's rows are too short to notice.
        chunk = getattr(config, "attention_chunk_size", None)
        if chunk is not None and chunk < self.max_model_len:
            raise UnsupportedModelError(f"a mask of its own cuts its attention into chunks of {chunk} tokens")
        self.model.set_attn_implementation(ATTENTION_NAME)
        packed = PackedForward(self.model, self._context)
        declared = _num_windowed_layers(config, self.max_model_len)
        if self._context.num_windowed < declared:
            raise UnsupportedModelError(
                f"{declared} layers have a sliding window, {self._context.num_windowed} pass it to their attention"
            )
        self._context.num_calls = 0
        result = check_forward(packed, references, rows, self.dtype, self.device)
        if result.reason is not None:
            raise UnsupportedModelError(result.reason)
        expected_calls = NUM_PASSES * len(packed.layers)
        if self._context.num_calls != expected_calls:
            raise UnsupportedModelError(f"attention was called {self._context.num_calls} times, not {expected_calls}")
        return packed, result


def _hidden_size(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[1])


def _context_length(model: PreTrainedModel, wanted: int | None) -> int:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = min((int(limit) for limit in limits if limit), default=2048)
    unscaled = _unscaled_length(config, known)
    if unscaled < known:
        logger.warning(
            "max_model_len is capped at %d: beyond it this model's rotary frequencies depend on the longest row of the "
            "batch, so that a row's answer would depend on its neighbours",
            unscaled,
        )
    return min(unscaled, wanted) if wanted is not None else unscaled


def _unscaled_length(config: Any, known: int) -> int:
    """The longest position at which rotary frequencies are still the same for every row of a batch.

    transformers switches "dynamic" and "longrope" frequencies by the largest position in the whole packed batch.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    length = known
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            length = min(length, int(original or known))
    return length


def _num_windowed_layers(config: Any, max_model_len: int) -> int:
    """How many layers the configuration gives a sliding window that a row can exceed."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= max_model_len:
        return 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return int(config.num_hidden_layers)
    return sum(kind == "sliding_attention" for kind in layer_types)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    generation: Any = getattr(model, "generation_config", None)
    for source in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if source is not None:
            ids.update(source if isinstance(source, list | tuple) else [source])
    # A tokenizer may know more ids than the model has logits.
    return frozenset(int(i) for i in ids if 0 <= int(i) < model.config.get_text_config().vocab_size)


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
