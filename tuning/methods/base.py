"""What every method is: fp32 parameters that give a prompt, and the two files that PEFT would save of it."""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save
from torch import nn

from tuning.attention import KeysValues, LayerShape
from tuning.forward import PromptValues, by_layer
from tuning.packing import PromptSlot
from tuning.records import UnsupportedBackboneError

PROMPT_TENSOR = "prompt_embeddings"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """What a prompt is made to fit. `name` is written into PEFT's configuration."""

    name: str
    hidden_size: int
    num_attention_heads: int
    layers: tuple[LayerShape, ...]
    device: torch.device

    def deep_layer(self) -> LayerShape:
        """The shape that all layers share. Raises UnsupportedBackboneError where they differ."""
        first = self.layers[0]
        if any(layer != first for layer in self.layers) or first.key_dim != first.value_dim:
            raise UnsupportedBackboneError(
                "the backbone's layers differ in their keys and values, so that it takes no prefix; train the prompt "
                "with prompt_tuning or p_tuning"
            )
        return first


class SoftPrompt(nn.Module, ABC):
    """One prompt in training. Its parameters are fp32, on the backbone's device, whatever the backbone's dtype."""

    num_virtual_tokens: int

    @abstractmethod
    def forward(self) -> torch.Tensor:
        """The prompt now, fp32, in the shape of PEFT's tensor, with gradients to the parameters."""

    @property
    @abstractmethod
    def slot(self) -> PromptSlot:
        """How the prompt lies in a pass."""

    @abstractmethod
    def values(self, prompt: torch.Tensor, dtype: torch.dtype) -> PromptValues:
        """What `forward` gave, as a pass takes it."""

    @abstractmethod
    def peft_config(self) -> PeftConfig:
        """PEFT's configuration of this prompt."""

    @property
    def num_parameters(self) -> int:
        """Of the prompt in its file: what a reparametrisation needs beside it is discarded."""
        with torch.no_grad():
            return int(self().numel())

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that PEFT saves, fp32, on the CPU; no view of the parameters."""
        return {PROMPT_TENSOR: self().detach().to("cpu", copy=True).contiguous()}


class VectorPrompt(SoftPrompt):
    """A prompt of k vectors in front of the input embeddings: `forward` gives `[k, d]`."""

    @property
    def slot(self) -> PromptSlot:
        return PromptSlot(self.num_virtual_tokens, in_pass=True)

    def values(self, prompt: torch.Tensor, dtype: torch.dtype) -> PromptValues:
        return prompt.to(dtype)


class DeepPrompt(SoftPrompt):
    """A prompt of keys and values in every layer. `forward` gives them flat, as PEFT keeps them: layer after layer,
    keys before values, `[k, layers * 2 * kv_heads * head_dim]`.
    """

    def __init__(self, backbone: BackboneFacts) -> None:
        super().__init__()
        layer = backbone.deep_layer()
        self._num_layers, self._kv_heads, self._head_dim = len(backbone.layers), layer.kv_heads, layer.key_dim

    @property
    def slot(self) -> PromptSlot:
        return PromptSlot(self.num_virtual_tokens, in_pass=False)

    @property
    def width(self) -> int:
        """Numbers of one virtual token."""
        return self._num_layers * 2 * self._kv_heads * self._head_dim

    def values(self, prompt: torch.Tensor, dtype: torch.dtype) -> PromptValues:
        shaped = prompt.view(self.num_virtual_tokens, self._num_layers, 2, self._kv_heads, self._head_dim)
        return by_layer(shaped.permute(1, 2, 3, 0, 4), dtype)


def flatten_layers(layers: Sequence[KeysValues], num_tokens: int) -> torch.Tensor:
    """The first tokens' keys and values as PEFT keeps them, fp32: `[num_tokens, layers * 2 * kv_heads * head_dim]`."""
    parts = [kept[:, :num_tokens].transpose(0, 1).flatten(1) for layer in layers for kept in layer]
    return torch.cat(parts, dim=1).float()


def common_fields(backbone: BackboneFacts, num_virtual_tokens: int, *, deep: bool) -> dict[str, Any]:
    """The fields that PEFT fills in from the model, for prompts of vectors or of keys and values."""
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": len(backbone.layers),
        "num_attention_heads": backbone.num_attention_heads,
        "token_dim": backbone.hidden_size,
        "base_model_name_or_path": backbone.name,
        "inference_mode": True,
    }
    if deep:
        layer = backbone.deep_layer()
        fields |= {"num_attention_heads": layer.kv_heads, "token_dim": layer.kv_heads * layer.key_dim}
    return fields


def save_peft_files(
    folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write PEFT's two files, each whole or not at all, the weights first. Raises ValueError where a number is not
    finite in `dtype`, OSError where the disk fails; nothing is written then.
    """
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite as {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prompt-", dir=folder) as made:
        temporary = Path(made)
        # Not by the library's own writing, whose errors of the disk are no OSError.
        (temporary / WEIGHTS_FILE).write_bytes(save(cast, metadata={"format": "pt"}))
        config.save_pretrained(str(temporary))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            path = temporary / name
            # A server often runs as somebody else.
            path.chmod(0o644)
            sync(path)
            path.replace(folder / name)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
