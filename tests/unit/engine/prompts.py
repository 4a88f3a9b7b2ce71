"""Prompt references and soft prompts for the engine's tests: small, random, from fixed seeds."""

import numpy as np

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.request import PromptRef


def make_ref(key: str, *, k: int = 3, kind: str = "embeddings", task: str | None = None, version: int = 1) -> PromptRef:
    """A reference whose digest and prefix key are told from all others by `key`."""
    return PromptRef(
        tenant="t",
        task=task if task is not None else f"task-{key}",
        version=version,
        digest=f"digest-{key}",
        prefix_key=f"key-{key}",
        kind=kind,
        num_virtual_tokens=k,
    )


def make_prompt(backbone: Backbone, ref: PromptRef, *, seed: int, scale: float = 0.5) -> SoftPrompt:
    """Random numbers of the reference's kind and k, in the backbone's shapes (uniform layers)."""
    generator = np.random.default_rng(seed)
    k, layer = ref.num_virtual_tokens, backbone.layers[0]
    if ref.kind == "embeddings":
        shape: tuple[int, ...] = (k, backbone.hidden_size)
    else:
        shape = (len(backbone.layers), 2, layer.kv_heads, k, layer.key_dim)
    values = (generator.standard_normal(shape) * scale).astype(np.float32)
    return SoftPrompt(kind="embeddings" if ref.kind == "embeddings" else "prefix", values=values)
