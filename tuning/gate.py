"""The check before the first step: what is trained packed is what the stock model computes.

Two ragged rows with prompts of both kinds are run packed, and one by one by the model's own plain attention. Their
logits and the gradients of the prompts must agree, and one row must not move when its neighbour changes: models that
ignore the attention function fail the first, models that keep state across tokens outside of attention the second.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from tuning.forward import PackedPass, PromptValues, by_layer, embed
from tuning.losses import cross_entropies
from tuning.packing import PromptSlot, Row, pack
from tuning.records import UnsupportedBackboneError

LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest allowed root-mean-square difference of logits, relative to their spread: the server's own."""
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.6, torch.float16: 0.1}
"""Largest allowed root-mean-square difference of a gradient, relative to its size. Of random texts, bf16 leaves some
tenths of it to rounding; what has nothing to do with each other differs by 1.4.
"""

_STOCK_ATTENTION = "eager"
_NUM_VIRTUAL = 3
_LONG, _SHORT, _NUM_TARGETS = 13, 5, 3


def check_backbone(packed: PackedPass) -> None:
    """Raises UnsupportedBackboneError, with the reason, for a backbone over which a packed pass is not right."""
    model_type = packed.model.config.model_type
    if _counts_columns(packed.model):
        raise UnsupportedBackboneError(
            f"no prompt can be trained over {model_type} by packed passes: it attends by the places of tokens in the "
            "batch, not in their rows"
        )
    try:
        fault = _find_fault(packed)
    except Exception as error:  # whatever a model does that was never meant to be run so
        if error is packed.boundary_error:
            raise
        fault = f"it fails ({type(error).__name__}: {error})"
    if fault is not None:
        raise UnsupportedBackboneError(f"no prompt can be trained over {model_type} by packed passes: {fault}")


def _find_fault(packed: PackedPass) -> str | None:
    rows = _rows(int(packed.model.config.get_text_config().vocab_size))
    for kind, prompt in _prompts(packed):
        fault = _compare(packed, rows, prompt)
        if fault is not None:
            return f"with {kind}, {fault}"
    return None


def _counts_columns(model: PreTrainedModel) -> bool:
    """Llama 4's temperature and Doge's choice of keys, which short rows do not show."""
    tuned = any(getattr(module, "attn_temperature_tuning", None) for module in model.modules())
    return tuned or bool(getattr(model.config.get_text_config(), "keep_window_size", None))


def _prompts(packed: PackedPass) -> list[tuple[str, torch.Tensor]]:
    """Embeddings as vectors and, where all layers agree in shape, a text's keys and values."""
    model, device = packed.model, packed.device
    ids = torch.arange(1, _NUM_VIRTUAL + 1, device=device)
    kinds = [("vectors in front", embed(model, ids).float())]
    if len(set(packed.layers)) == 1 and packed.layers[0].key_dim == packed.layers[0].value_dim:
        row = Row(0, tuple(ids.tolist()), (0,))
        layers = packed.keys_values(pack([row], [PromptSlot(0, in_pass=False)], device))
        kinds.append(("keys and values", torch.stack([torch.stack(pair) for pair in layers]).float()))
    return kinds


def _rows(vocab_size: int) -> list[Row]:
    """Two ragged rows, and a second version of the longer one with other content."""
    generator = torch.Generator().manual_seed(20)
    texts = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in (_SHORT, _LONG, _LONG)]
    targets = torch.randint(0, vocab_size, (_NUM_TARGETS,), generator=generator).tolist()
    return [Row(0, tuple(text), tuple(targets)) for text in texts]


def _compare(packed: PackedPass, rows: Sequence[Row], prompt: torch.Tensor) -> str | None:
    short, long, other = rows
    logits, gradient = _packed(packed, [short, long], prompt)
    moved, _ = _packed(packed, [short, other], prompt)
    expected, expected_gradient = _apart(packed.model, [short, long], prompt)
    tolerance = LOGITS_TOLERANCE[packed.dtype]
    spread = expected.std().clamp_min(1e-6)
    error = float((logits - expected).square().mean().sqrt() / spread)
    if not error <= tolerance:
        return f"logits differ from the stock model's by {error:.1e} of their spread (allowed {tolerance:.0e})"
    scale = expected_gradient.square().mean().sqrt().clamp_min(1e-12)
    error = float((gradient - expected_gradient).square().mean().sqrt() / scale)
    if not error <= GRADIENT_TOLERANCE[packed.dtype]:
        return f"the prompt's gradient differs from the stock model's by {error:.0%}"
    leak = float((moved[:_NUM_TARGETS] - logits[:_NUM_TARGETS]).square().mean().sqrt() / spread)
    if not leak <= tolerance / 10:
        return f"a row's logits move by {leak:.1e} of their spread when its neighbour changes"
    return None


def _packed(packed: PackedPass, rows: Sequence[Row], prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' logits row by row, fp32, and the prompt's gradient of the sum of the rows' mean losses."""
    leaf = prompt.clone().requires_grad_()
    slot = PromptSlot(_NUM_VIRTUAL, in_pass=leaf.dim() == 2)
    values: PromptValues = leaf.to(packed.dtype) if slot.in_pass else by_layer(leaf, packed.dtype)
    batch = pack(rows, [slot], packed.device)
    with packed.logits(batch, [values]) as logits:
        torch.autograd.backward(cross_entropies(logits, batch.target_ids).sum() / _NUM_TARGETS)
    assert leaf.grad is not None
    return logits.detach()[torch.argsort(batch.target_rows, stable=True)].float(), leaf.grad


def _apart(model: PreTrainedModel, rows: Sequence[Row], prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the stock model, one row at a time."""
    leaf = prompt.clone().requires_grad_()
    stock: Any = model
    was = model.config._attn_implementation
    model.set_attn_implementation(_STOCK_ATTENTION)
    found = []
    try:
        for row in rows:
            embeds = embed(model, torch.tensor(row.token_ids, device=model.device)).unsqueeze(0)
            kwargs: dict[str, Any] = {"use_cache": False}
            if leaf.dim() == 2:
                embeds = torch.cat([leaf.to(embeds).unsqueeze(0), embeds], dim=1)
            else:
                cache = DynamicCache()
                for index, (keys, values) in enumerate(by_layer(leaf, model.dtype)):
                    cache.update(keys.unsqueeze(0), values.unsqueeze(0), index)
                length = _NUM_VIRTUAL + embeds.shape[1]
                mask = torch.ones((1, length), dtype=torch.long, device=model.device)
                kwargs = {"use_cache": True, "past_key_values": cache, "attention_mask": mask}
            found.append(stock(inputs_embeds=embeds, **kwargs).logits[0, -_NUM_TARGETS:].float())
        targets = torch.tensor([target for row in rows for target in row.target_ids], device=model.device)
        logits = torch.cat(found)
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / _NUM_TARGETS)
    finally:
        model.set_attn_implementation(was)
    assert leaf.grad is not None
    return logits.detach(), leaf.grad
