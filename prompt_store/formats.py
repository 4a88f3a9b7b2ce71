"""The file format of prompts: `adapter_model.safetensors` + `adapter_config.json`, exactly as PEFT's
`save_pretrained` writes them.

Owns the one place where a file's tensors become a SoftPrompt. Pure functions over bytes: no files, no catalog.

- PROMPT_TUNING (Lester et al. 2021), P_TUNING (Liu et al. 2021), CPT: PEFT saves the finished vectors.
- MULTITASK_PROMPT_TUNING (Wang et al. 2023): the shared vectors times one task's low-rank factors, taken here.
- PREFIX_TUNING (Li & Liang 2021; Liu et al. 2022) and CARTRIDGE (Eyuboglu et al. 2025): PEFT saves the product of the
  projection, if there was one, so that `prefix_projection` does not matter here.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prompt_store.adapter_config import MULTITASK, AdapterConfig, read_config
from prompt_store.cautions import find_warnings
from prompt_store.errors import InvalidConfig, PromptMismatch
from prompt_store.manifest import BackboneShape, PromptKind, ServingDtype, SoftPrompt
from prompt_store.tensor_file import read_tensors

MAX_HEADER_BYTES = 16 * 1024
MAX_FACTORS_HEADER_BYTES = 64 * 1024

PROMPT_TENSOR = "prompt_embeddings"
TASK_COLS_TENSOR = "prefix_task_cols"
TASK_ROWS_TENSOR = "prefix_task_rows"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPrompt:
    """A file that passed every check: what the manifest says about it, and its numbers."""

    digest: str
    prefix_key: str
    peft_type: str
    kind: PromptKind
    task_index: int | None
    num_virtual_tokens: int
    num_bytes: int
    warnings: tuple[str, ...]
    soft_prompt: SoftPrompt


def check_file(
    file_bytes: bytes, config_bytes: bytes, *, backbone: BackboneShape, task_index: int | None = None
) -> CheckedPrompt:
    """Check both files against each other and the backbone, and read them. The caller bounds their sizes.

    Raises UnsupportedFile (not a sound safetensors file), InvalidConfig (the configuration or `task_index` is wrong) or
    PromptMismatch (sound, but does not fit).
    """
    config = read_config(config_bytes)
    if config.peft_type == MULTITASK:
        tensors = read_tensors(
            file_bytes,
            expected_names=(PROMPT_TENSOR, TASK_COLS_TENSOR, TASK_ROWS_TENSOR),
            max_header_bytes=MAX_FACTORS_HEADER_BYTES,
        )
        _check_rank(tensors[PROMPT_TENSOR], PROMPT_TENSOR, 2)
        task_index = _check_factors(tensors, config, task_index)
        embeddings = _take_product(tensors, task_index)
    else:
        if task_index is not None:
            raise InvalidConfig(
                f"task_index is only for {MULTITASK} files; this is {config.peft_type}.", param="task_index"
            )
        tensors = read_tensors(file_bytes, expected_names=(PROMPT_TENSOR,), max_header_bytes=MAX_HEADER_BYTES)
        embeddings = tensors[PROMPT_TENSOR]
        _check_rank(embeddings, PROMPT_TENSOR, 2)
    num_virtual_tokens = embeddings.shape[0]
    _check_count(num_virtual_tokens, config, backbone)
    digest = hashlib.sha256(file_bytes).hexdigest()
    # Under another backbone the same bytes are another prompt, and get a version of their own.
    key_parts = [digest, backbone.fingerprint[:16], config.kind]
    if config.kind == "prefix":
        kv_heads, head_dim = _check_prefix_shape(embeddings, config, backbone)
        values = _split_heads(embeddings, backbone.num_layers, kv_heads, head_dim)
        key_parts.append(f"{backbone.num_layers}x{kv_heads}x{head_dim}")
    else:
        _check_embeddings_shape(embeddings, config, backbone)
        values = np.ascontiguousarray(embeddings)
        if task_index is not None:
            key_parts.append(f"task{task_index}")
    _check_finite_when_served(values, backbone.dtype)
    return CheckedPrompt(
        digest=digest,
        prefix_key=":".join(key_parts),
        peft_type=config.peft_type,
        kind=config.kind,
        task_index=task_index,
        num_virtual_tokens=num_virtual_tokens,
        num_bytes=len(file_bytes),
        warnings=find_warnings(config, values, backbone),
        soft_prompt=SoftPrompt(kind=config.kind, values=values),
    )


def read_soft_prompt(
    file_bytes: bytes, config_bytes: bytes, *, backbone: BackboneShape, task_index: int | None = None
) -> SoftPrompt:
    """The numbers alone; checks and errors as in `check_file`."""
    return check_file(file_bytes, config_bytes, backbone=backbone, task_index=task_index).soft_prompt


def _check_rank(tensor: Array, name: str, num_dims: int) -> None:
    if tensor.ndim != num_dims:
        raise PromptMismatch(f"{name} has shape {list(tensor.shape)}; {num_dims} dimensions are needed.", param="file")


def _check_count(num_virtual_tokens: int, config: AdapterConfig, backbone: BackboneShape) -> None:
    _check_field(config.num_virtual_tokens, num_virtual_tokens, "num_virtual_tokens", "the file has")
    if num_virtual_tokens > backbone.max_virtual_tokens:
        raise PromptMismatch(
            f"The prompt has {num_virtual_tokens} virtual tokens; at most {backbone.max_virtual_tokens} are allowed.",
            param="file",
        )


def _check_field(found: int | None, needed: int, name: str, whose: str) -> None:
    if found is not None and found != needed:
        raise PromptMismatch(f"adapter_config.json says {name} {found}; {whose} {needed}.", param=f"config.{name}")


def _check_embeddings_shape(embeddings: Array, config: AdapterConfig, backbone: BackboneShape) -> None:
    if embeddings.shape[1] != backbone.hidden_size:
        raise PromptMismatch(
            f"{PROMPT_TENSOR} has shape {list(embeddings.shape)}; the backbone {backbone.name} needs "
            f"[{embeddings.shape[0]}, {backbone.hidden_size}].",
            param="file",
        )
    _check_field(config.token_dim, backbone.hidden_size, "token_dim", f"the backbone {backbone.name} has")
    _check_field(config.num_layers, backbone.num_layers, "num_layers", f"the backbone {backbone.name} has")


def _check_prefix_shape(embeddings: Array, config: AdapterConfig, backbone: BackboneShape) -> tuple[int, int]:
    if backbone.kv_heads is None or backbone.head_dim is None:
        raise PromptMismatch(
            f"The layers of the backbone {backbone.name} differ in their keys and values, so that it takes no "
            f"{config.peft_type} files; tune the prompt with PROMPT_TUNING instead.",
            param="config.peft_type",
        )
    kv_dim = backbone.kv_heads * backbone.head_dim
    width = backbone.num_layers * 2 * kv_dim
    if embeddings.shape[1] != width:
        raise PromptMismatch(
            f"{PROMPT_TENSOR} has shape {list(embeddings.shape)}; the backbone {backbone.name} needs "
            f"[{embeddings.shape[0]}, {width}] ({backbone.num_layers} layers, keys and values, {backbone.kv_heads} "
            f"heads of {backbone.head_dim}).",
            param="file",
        )
    whose = f"a prefix for the backbone {backbone.name} has"
    _check_field(config.num_layers, backbone.num_layers, "num_layers", whose)
    _check_field(config.token_dim, kv_dim, "token_dim", whose)
    # The heads decide how the same numbers are cut up: a wrong count would fit and answer wrongly.
    _check_field(config.num_attention_heads, backbone.kv_heads, "num_attention_heads", whose)
    return backbone.kv_heads, backbone.head_dim


def _split_heads(embeddings: Array, num_layers: int, kv_heads: int, head_dim: int) -> Array:
    """`[k, layers*2*kv_heads*head_dim]` → `[layers, 2, kv_heads, k, head_dim]`; keys and values alternate by layer."""
    k = embeddings.shape[0]
    by_layer = embeddings.reshape(k, num_layers, 2, kv_heads, head_dim)
    return np.ascontiguousarray(by_layer.transpose(1, 2, 3, 0, 4))


def _check_factors(tensors: dict[str, Array], config: AdapterConfig, task_index: int | None) -> int:
    """Check the low-rank factors against the shared vectors and the configuration; the task they are taken for."""
    embeddings, cols, rows = (tensors[name] for name in (PROMPT_TENSOR, TASK_COLS_TENSOR, TASK_ROWS_TENSOR))
    _check_rank(cols, TASK_COLS_TENSOR, 3)
    _check_rank(rows, TASK_ROWS_TENSOR, 3)
    num_tasks, num_ranks = cols.shape[0], cols.shape[2]
    k, width = embeddings.shape
    for name, tensor, needed in (
        (TASK_COLS_TENSOR, cols, (num_tasks, k, num_ranks)),
        (TASK_ROWS_TENSOR, rows, (num_tasks, num_ranks, width)),
    ):
        if tensor.shape != needed:
            raise PromptMismatch(
                f"{name} has shape {list(tensor.shape)}; {list(needed)} is needed to fit {PROMPT_TENSOR} "
                f"{list(embeddings.shape)} and {num_tasks} tasks of rank {num_ranks}.",
                param="file",
            )
    _check_field(config.num_tasks, num_tasks, "num_tasks", "the file has")
    _check_field(config.num_ranks, num_ranks, "num_ranks", "the file has")
    if task_index is None:
        if num_tasks > 1:
            raise InvalidConfig(f"The file holds {num_tasks} tasks: task_index must say which one.", param="task_index")
        return 0
    if not 0 <= task_index < num_tasks:
        raise InvalidConfig(
            f"task_index is {task_index}; the file holds {num_tasks} tasks, counted from 0.", param="task_index"
        )
    return task_index


def _take_product(tensors: dict[str, Array], task_index: int) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        low_rank = tensors[TASK_COLS_TENSOR][task_index] @ tensors[TASK_ROWS_TENSOR][task_index]
        product: Array = tensors[PROMPT_TENSOR] * low_rank
    if not np.isfinite(product).all():
        raise PromptMismatch("The product of the task's factors is not finite in float32.", param="file")
    return product


def _check_finite_when_served(values: Array, dtype: ServingDtype) -> None:
    if dtype == "float16":
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float16)).all()
    elif dtype == "bfloat16":
        # Rounding to the nearest bfloat16 adds at most half a step: what carries into the exponent 0xFF is infinite.
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        finite = ((rounded & np.uint32(0x7F800000)) != np.uint32(0x7F800000)).all()
    else:
        return
    if not finite:
        raise PromptMismatch(
            f"The prompt holds numbers up to {float(np.abs(values).max()):.4g}, which are infinite in {dtype}, the "
            "dtype that the backbone is served in.",
            param="file",
        )
