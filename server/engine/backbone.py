"""The backbone: one frozen model, resident on one device, and the way it is run.

Loads any decoder-only model that transformers loads from safetensors, freezes it, takes its fingerprint, puts it
through the gate and keeps the first way of running it that passes: packed, else dense, else it is refused. Code
shipped with a model is never run (`auto_map` is refused), and pickled weights are never read.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prompt_store.manifest import BackboneShape, ServingDtype
from server.engine.attention import ATTENTION_NAME, StepContext, attach_context, attention_set_to
from server.engine.checkpoint import (
    DTYPES,
    STOCK_ATTENTION,
    BackboneError,
    choose_device,
    choose_dtype,
    load_folder,
    refuse_shipped_code,
    resolve_folder,
)
from server.engine.compiled import CompiledForward
from server.engine.fingerprint import fingerprint_folder
from server.engine.forward import DenseForward, Forward, PackedForward, UnsupportedModelError, reference_logits
from server.engine.gate import (
    NUM_PASSES,
    GateResult,
    check_deterministic,
    check_forward,
    check_shared_passes,
    gate_references,
    gate_rows,
)
from server.engine.inspection import Vocabulary
from server.engine.kernels.choose import choose_kernel
from server.engine.kernels.native import NativeUnavailableError, load_native
from server.engine.kv import KeysValues, KvPool, bytes_per_token
from server.engine.linear import LinearError, LinearReport, ProbeError, prepare_linears
from server.engine.model_limits import (
    context_length,
    embeddings_fault,
    freeze,
    hidden_size,
    num_windowed_layers,
)
from server.engine.own_thread import in_own_thread
from server.engine.packed_weights import Quantization
from server.engine.plan import StepPlan
from server.engine.status import CompiledState

logger = logging.getLogger(__name__)

MIN_COMPILED_BYTES = 32 << 20
"""Weights smaller than this make steps so short that compiling them is not worth a minute of a core."""


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
        quantization: Quantization = "none",
    ) -> None:
        """Freeze `model` and put it through the gate. Raises BackboneError when it can be served in no way.

        `quantization` says what was done to its weights before (`prepare_linears`).
        """
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.quantization: Quantization = quantization
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.hidden_size = hidden_size(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_model_len = context_length(model, max_model_len)
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self.num_parameters = model.num_parameters()
        """As transformers made it: tied weights once, before any are packed."""
        self.vocabulary = Vocabulary(model.get_input_embeddings(), size=self.vocab_size, device=self.device)
        self.kernel, kernel = choose_kernel(self.device)
        self._context = StepContext(kernel)
        attach_context(model, self._context)
        self.path: Literal["packed", "dense"]
        self.path, self._forward, self.gate = self._choose_forward()
        self.layers = self._forward.layers
        self.linears: LinearReport | None = None
        """What `load` did to the weights of linear layers; None where they are as transformers made them."""
        self.prefixes_share_passes = False
        """Whether prompts may be compiled together: their bits are what they are alone."""
        self._compiled: CompiledForward | None = None

    @classmethod
    @in_own_thread
    def load(
        cls,
        source: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        cache_dir: Path | None = None,
        name: str | None = None,
        quantization: Quantization = "none",
    ) -> "Backbone":
        """Load from a folder or a hub id. Takes seconds, and half a minute more where C++ must be compiled; blocking.

        `dtype` "auto" is bf16 where the device has the instructions, else fp32; `device` "auto" is CUDA where there is
        one. `quantization` "int8" stores the weights of linear layers in 8 bits (CPU only). `cache_dir` keeps the
        fingerprint and compiled steps. Raises BackboneError.
        """
        chosen_device = choose_device(device)
        chosen_dtype = choose_dtype(dtype, chosen_device)
        if quantization == "int8" and chosen_device.type != "cpu":
            raise BackboneError(f"quantization int8 is for backbones on the CPU, not on {chosen_device}")
        if chosen_device.type == "cpu" and cache_dir is not None:
            # Where there is none, `choose_kernel` says so.
            with suppress(NativeUnavailableError):
                load_native(cache_dir / "native")
        folder = resolve_folder(source)
        refuse_shipped_code(folder)
        model, tokenizer = _read(source, folder, chosen_dtype, chosen_device)
        num_parameters = model.num_parameters()
        linears: LinearReport | None = None
        try:
            linears = prepare_linears(model, quantization=quantization)
        except ProbeError as error:
            raise BackboneError(f"{source} cannot be run: {error}") from error
        except LinearError as error:
            if quantization != "none":
                raise BackboneError(f"{source}: {error}") from error
            logger.warning("the weights of %s stay as they are: %s", source, error)
        if linears is None:
            # They may be half packed. Let go of first, so that there is room for them twice.
            del model
            model, tokenizer = _read(source, folder, chosen_dtype, chosen_device)
        backbone = cls(
            model,
            tokenizer,
            name=name or folder.name,
            fingerprint=fingerprint_folder(folder, cache_dir),
            max_model_len=max_model_len,
            quantization=quantization,
        )
        backbone.num_parameters = num_parameters
        backbone.linears = linears
        # Others' products are rounded in ways that depend on how many rows they have.
        if (
            linears is not None
            and linears.form == "native"
            and backbone.kernel == "native"
            and backbone.path == "packed"
        ):
            backbone.prefixes_share_passes = check_shared_passes(
                backbone._forward, backbone.hidden_size, backbone.dtype, backbone.device
            )
        backbone._offer_compiled(folder, cache_dir)
        return backbone

    @property
    def dtype_name(self) -> ServingDtype:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def compiled_state(self) -> CompiledState:
        """How far the compiled step is."""
        return self._compiled.state if self._compiled is not None else "off"

    @property
    def is_settled(self) -> bool:
        """Whether steps are served as they will be: nothing is being compiled, or tried that was begun."""
        return self._compiled is None or self._compiled.is_settled

    @property
    def compiled_sizes(self) -> list[int]:
        """Sizes of steps that are served compiled: s stands for steps of s to 2s - 1 tokens."""
        return self._compiled.faster_sizes if self._compiled is not None else []

    @property
    def device_name(self) -> str:
        return str(self.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of one row takes, all layers together."""
        return bytes_per_token(self.layers, self.dtype)

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
            num_parameters=self.num_parameters,
            embedding_norm_mean=self.vocabulary.norms.mean,
            embedding_norm_std=self.vocabulary.norms.std,
        )

    @torch.inference_mode()
    def capture_decode(self, pool: KvPool, max_rows: int) -> None:
        """Serve decode steps over this pool by CUDA graphs, if this packed backbone is on CUDA and can be captured."""
        if self.device.type != "cuda" or not isinstance(self._forward, PackedForward):
            return
        try:
            self._forward.capture(pool, max_rows=max_rows, max_columns=self.max_model_len)
        except RuntimeError as error:
            logger.warning("decode steps run without CUDA graphs: %s", error)

    def start_compiling(self) -> None:
        """Have steps compiled in the background, if this backbone can be; served eagerly until then. Any thread."""
        if self._compiled is not None:
            self._compiled.start()

    def stop_compiling(self) -> None:
        """End what `start_compiling` began, for good: it cannot be started again. No step may be running."""
        if self._compiled is not None:
            self._compiled.stop()

    def set_deterministic(self, max_rows: int | None) -> None:
        """From now on a row's bits do not depend on what shares its step, if the scheduler does its part.

        None ends that.

        Steps of decoding rows are padded to `max_rows` tokens, so that every product has one shape. Raises
        BackboneError when the model's bits are seen to depend on the batch even so: experts, for instance, group the
        tokens of a batch themselves.
        """
        if self.kernel == "triton":
            _, self._context.kernel = choose_kernel(self.device, is_deterministic=max_rows is not None)
        if isinstance(self._forward, PackedForward):
            self._forward.decode_tokens = max_rows
            # What serves a step is chosen by time, which is no function of the row.
            self._forward.compiled = self._compiled if max_rows is None else None
        elif max_rows is not None:
            raise BackboneError(f"{self.name} runs on the dense path, which is not deterministic across batches")
        if max_rows is not None and not check_deterministic(
            self._forward, max_rows, self.vocab_size, self.dtype, self.device, self.max_model_len
        ):
            raise BackboneError(
                f"{self.name}: a row's logits depend on what shares its batch; it cannot be deterministic"
            )

    @torch.inference_mode()
    def forward(self, pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Run one step. Returns the logits `[L, vocab_size]` of `plan.logits_tokens`, in the serving dtype.

        `sampled` are the tokens that the plan's sources name, on the device (packed path alone).
        """
        return self._forward.run(pool, plan, sampled)

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

    def _offer_compiled(self, folder: Path, cache_dir: Path | None) -> None:
        """Make compiled steps possible where they are known to help: packed, on CPU, weights of some size."""
        if (
            isinstance(self._forward, PackedForward)
            and self.kernel == "native"
            and cache_dir is not None
            and self.linears is not None
            and self.linears.num_bytes >= MIN_COMPILED_BYTES
        ):
            self._compiled = self._forward.compiled = CompiledForward(
                self.model,
                folder,
                fingerprint=self.fingerprint,
                dtype=self.dtype,
                form=self.linears.form,
                quantization=self.quantization,
                cache_dir=cache_dir,
            )

    @contextmanager
    def serving_within(self) -> Iterator[None]:
        """Around steps that are run in the middle of another's pass over the model, between two of its layers."""
        with (
            attention_set_to(self.model, ATTENTION_NAME if self.path == "packed" else STOCK_ATTENTION),
            torch.no_grad(),
        ):
            yield

    def _stock_attention(self) -> AbstractContextManager[None]:
        return attention_set_to(self.model, STOCK_ATTENTION) if self.path == "packed" else nullcontext()

    @torch.inference_mode()
    def _choose_forward(self) -> tuple[Literal["packed", "dense"], Forward, GateResult]:
        rows = gate_rows(self.vocab_size)
        try:
            references = gate_references(self.model, rows)
        except Exception as error:
            raise BackboneError(f"{self.name} cannot be run: {type(error).__name__}: {error}") from error
        fault = embeddings_fault(self.model, rows[0], references[0])
        if fault is not None:
            raise BackboneError(f"{self.name} ({self.model.config.model_type}) is refused: {fault}.")
        try:
            packed, result = self._try_packed(references, rows)
        except UnsupportedModelError as error:
            packed_reason = str(error)
        except Exception as error:
            packed_reason = f"{type(error).__name__}: {error}"
        else:
            return "packed", packed, result
        self.model.set_attn_implementation(STOCK_ATTENTION)
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
        declared = num_windowed_layers(config, self.max_model_len)
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


def _read(
    source: str, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model on its device, and its tokenizer. Raises BackboneError."""
    try:
        model, tokenizer = load_folder(folder, dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"{source} could not be loaded: {error}") from error
    torch.nn.Module.to(model, device)
    return freeze(model), tokenizer


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    generation: Any = getattr(model, "generation_config", None)
    for source in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if source is not None:
            ids.update(source if isinstance(source, list | tuple) else [source])
    # A tokenizer may know more ids than the model has logits.
    return frozenset(int(i) for i in ids if 0 <= int(i) < model.config.get_text_config().vocab_size)
