"""What the gate's short rows cannot see of a model: how long rows may be, its windows, what it knows of token ids."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from server.engine.forward import reference_logits
from server.engine.gate import TOLERANCE, relative_difference

logger = logging.getLogger(__name__)


@torch.inference_mode()
def embeddings_fault(model: PreTrainedModel, token_ids: Sequence[int], by_embeddings: torch.Tensor) -> str | None:
    """Why vectors cannot stand in the place of token embeddings in this model; None when they can.

    Some models look up more by token id than the input embeddings (Gemma 3n and 4: an embedding a layer). Given
    embeddings alone they answer otherwise, or fail. `by_embeddings [n, vocab_size]` are the logits of `token_ids` when
    their embeddings are given.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    by_ids: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    if relative_difference(by_embeddings, by_ids) > TOLERANCE[model.dtype]:
        return "it answers otherwise when it is given the embeddings of tokens in place of their ids"
    vector = torch.zeros(1, hidden_size(model), dtype=model.dtype, device=model.device)
    try:
        reference_logits(model, token_ids, vectors=vector)
    except Exception as error:
        return f"it takes no vector in the place of a token's embedding ({type(error).__name__}: {error})"
    return None


def hidden_size(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[1])


def context_length(model: PreTrainedModel, wanted: int | None) -> int:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = min((int(limit) for limit in limits if limit), default=2048)
    unscaled = _unscaled_length(config, known)
    if unscaled < known:
        logger.warning(
            "max_model_len is capped at %d: beyond it this model counts positions by its batch, so that a row's answer "
            "would depend on its neighbours",
            unscaled,
        )
    return min(unscaled, wanted) if wanted is not None else unscaled


def _unscaled_length(config: Any, known: int) -> int:
    """The longest row that is computed alike whatever shares its batch.

    transformers switches "dynamic" and "longrope" frequencies by the largest position in the whole packed batch.
    Llama 4's temperature and Doge's choice of keys begin at a column, which they count in the batch and not in the row.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    length = known
    if getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None):
        length = min(length, int(config.floor_scale) - 1)
    if getattr(config, "keep_window_size", None):
        length = min(length, int(config.keep_window_size))
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            length = min(length, int(original or known))
    return length


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make a loaded model into one that is served, in place: whoever runs or compiles it must have done this."""
    model.train(False).requires_grad_(False)
    fix_temperature(model)
    return model


def fix_temperature(model: PreTrainedModel) -> None:
    """Turn off Llama 4's temperature, which is one up to `max_model_len`.

    Its layers count the columns of the packed batch in place of a row's own, and would scale rows by their neighbours.
    """
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", None):
            setattr(module, "attn_temperature_tuning", False)  # noqa: B010 (mypy takes it for a submodule)


def num_windowed_layers(config: Any, max_model_len: int) -> int:
    """How many layers the configuration gives a sliding window that a row can exceed."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= max_model_len:
        return 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return int(config.num_hidden_layers)
    return sum(kind == "sliding_attention" for kind in layer_types)
