"""A saved prompt as keys and values: what the stock model reads before a text, whatever the method that made it.

The files are read by the store's own reader, with the checks and the warnings that a server has for them. Vectors are
compiled once, as a server does; keys and values are taken as they are. Refuses to know what the model is asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel

from prompt_store.errors import PromptStoreError
from prompt_store.formats import CheckedPrompt, check_file
from prompt_store.manifest import BackboneShape, ServingDtype
from tuning.config import MAX_VIRTUAL_TOKENS

PROMPT_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
_DTYPES: Final[dict[torch.dtype, ServingDtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class PrefixError(ValueError):
    """A folder's prompt cannot be read, or does not fit the backbone; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of every layer, each `[1, kv_heads, k, head_dim]`, in the model's dtype and on its device.

    `warnings` are the store's own of the prompt, as an upload gives them.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_virtual_tokens: int
    warnings: tuple[str, ...] = ()

    def make_cache(self, num_rows: int) -> DynamicCache:
        """A cache whose rows begin with the prefix; forward passes may write to it."""
        cache = DynamicCache()
        for index, pair in enumerate(self.layers):
            keys, values = (part.expand(num_rows, -1, -1, -1) for part in pair)
            cache.update(keys, values, index)
        return cache


def load_prefix(folder: Path, model: PreTrainedModel, *, base_model_name: str) -> Prefix:
    """The prompt in a folder, as PEFT saves it. `base_model_name` is what the backbone is called.

    Raises PrefixError.
    """
    prompt = read_prompt(folder, backbone_shape(model, name=base_model_name))
    values = torch.from_numpy(prompt.soft_prompt.values).to(model.device, model.dtype)
    if prompt.kind == "prefix":
        layers = tuple((pair[0].unsqueeze(0), pair[1].unsqueeze(0)) for pair in values)
    else:
        layers = _compile(model, values)
    return Prefix(layers, prompt.num_virtual_tokens, prompt.warnings)


def read_prompt(folder: Path, shape: BackboneShape) -> CheckedPrompt:
    """A folder's two files, checked as a server checks them. Raises PrefixError."""
    try:
        file, config = ((folder / name).read_bytes() for name in (PROMPT_FILE, CONFIG_FILE))
        return check_file(file, config, backbone=shape)
    except OSError as error:
        raise PrefixError(f"{folder} cannot be read: {error.strerror}") from None
    except PromptStoreError as error:
        raise PrefixError(f"{folder}: {error}") from None


@torch.inference_mode()
def backbone_shape(model: PreTrainedModel, *, name: str) -> BackboneShape:
    """What a prompt must fit. Layers are measured by running one token, for not all configurations tell their shapes.

    The fingerprint is left empty: it is the server's to make.
    """
    layers = _layers_of(_run(model, input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device)))
    shapes = {(part.shape[1], part.shape[3]) for pair in layers for part in pair}
    kv_heads, head_dim = next(iter(shapes)) if len(shapes) == 1 else (None, None)
    embeddings = _embeddings(model)
    norms = embeddings.weight.detach().float().norm(dim=1)
    return BackboneShape(
        name=name,
        fingerprint="",
        hidden_size=int(embeddings.weight.shape[1]),
        num_layers=len(layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=_DTYPES.get(model.dtype, "float32"),
        max_virtual_tokens=MAX_VIRTUAL_TOKENS,
        model_type=model.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_norm_mean=norms.mean().item(),
        embedding_norm_std=norms.std(correction=0).item(),
    )


@torch.inference_mode()
def _compile(model: PreTrainedModel, vectors: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """`vectors [k, hidden_size]` → what they leave behind in every layer."""
    return _layers_of(_run(model, inputs_embeds=vectors.unsqueeze(0)))


def _run(model: PreTrainedModel, **inputs: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _layers_of(cache: DynamicCache) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    layers: list[Any] = cache.layers
    return tuple((layer.keys, layer.values) for layer in layers)


def _embeddings(model: PreTrainedModel) -> torch.nn.Embedding:
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    return embeddings
