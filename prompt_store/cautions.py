"""What the literature warns of in a prompt that is otherwise sound. A warning refuses nothing.

Each text begins with a stable code and a colon, for programs. Pure functions over numbers.
"""

from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from prompt_store.adapter_config import AdapterConfig
from prompt_store.manifest import BackboneShape
from prompt_store.names import shorten

# Fewer trained vectors than this lose accuracy on every backbone that Lester et al. (2021, figure 3a) measured but the
# largest.
FEW_VIRTUAL_TOKENS = 20
# Below this, prompts at the input alone stay behind fine-tuning (Lester et al. 2021, figure 1); prefixes in every layer
# do not (Liu et al. 2022).
SMALL_BACKBONE = 1_000_000_000
# Trained vectors may well be longer than any token's, by a few times. Beyond that a wrong learning rate, or a wrong
# backbone, is likelier.
FAR_NORM_RATIO = 5.0
FAR_NORM_DEVIATIONS = 4.0

Array = npt.NDArray[np.float32]


def find_warnings(config: AdapterConfig, values: Array, backbone: BackboneShape) -> tuple[str, ...]:
    """`values` as in SoftPrompt, of the kind that `config` says."""
    warnings = []
    if config.kind == "embeddings":
        warnings = [
            *few_virtual_tokens(values.shape[0]),
            *small_backbone(backbone.num_parameters),
            *_unusual_norms(values, backbone),
        ]
    if config.base_model and _last_part(config.base_model) != _last_part(backbone.name):
        warnings.append(
            f"other_base_model: The configuration names the base model {shorten(config.base_model)}; this backbone is "
            f"{backbone.name}."
        )
    return tuple(warnings)


def few_virtual_tokens(num_virtual_tokens: int) -> list[str]:
    """The warning, if there is one; for prompts at the input alone."""
    if num_virtual_tokens >= FEW_VIRTUAL_TOKENS:
        return []
    return [
        f"few_virtual_tokens: {num_virtual_tokens} virtual tokens are few: accuracy of prompt tuning drops below "
        f"{FEW_VIRTUAL_TOKENS} (Lester et al. 2021)."
    ]


def small_backbone(num_parameters: int | None) -> list[str]:
    """The warning, if there is one; for prompts at the input alone."""
    if num_parameters is None or num_parameters >= SMALL_BACKBONE:
        return []
    return [
        f"small_backbone: The backbone has {num_parameters / 1e6:.0f} million parameters: below a billion, "
        "prompt tuning stays behind fine-tuning (Lester et al. 2021); a prefix in every layer does better (Liu et al. "
        "2022)."
    ]


def _unusual_norms(values: Array, backbone: BackboneShape) -> list[str]:
    mean, std = backbone.embedding_norm_mean, backbone.embedding_norm_std
    if mean is None or std is None or mean <= 0:
        return []
    # Not through BLAS, whose threads would take the CPU from the engine's.
    norms = np.sqrt(np.einsum("kd,kd->k", values, values, dtype=np.float64))
    is_far = (norms > mean * FAR_NORM_RATIO) | (norms < mean / FAR_NORM_RATIO)
    is_far &= np.abs(norms - mean) > FAR_NORM_DEVIATIONS * std
    if not is_far.any():
        return []
    return [
        f"unusual_norms: {int(is_far.sum())} of {len(norms)} vectors have norms far from those of the vocabulary's "
        f"embeddings: {norms.min():.3g} to {norms.max():.3g}, against {mean:.3g} ± {std:.3g}."
    ]


def _last_part(model_name: str) -> str:
    return PurePath(model_name).name.lower()
