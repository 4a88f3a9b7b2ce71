"""The attention of a packed training pass: differentiable, and every row sees its own prompt and no other.

Registered with transformers' `AttentionInterface` under `ATTENTION_NAME`, so that any decoder calls it unchanged. Which
tokens are whose reaches it through the `PassContext` that hangs on the attention modules while a pass runs; no mask is
built by the model. Sliding windows, soft caps (Gemma 2) and sinks (gpt-oss) are computed; anything else that a model
asks of its attention is refused, never left out.

Rows attend in padded groups, so that a layer costs a few products and not one a row. Padding is zeros, and nothing of
one row is ever multiplied with another's: a row whose numbers are not finite spoils itself alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from tuning.packing import RowGroup

ATTENTION_NAME = "promptmux_tuning"

CONTEXT_ATTRIBUTE = "promptmux_tuning_context"

_MAX_SCORES = 1 << 25
"""Weights of attention that are held at once, in fp32; beyond it torch's fused kernel holds none."""

_NEUTRAL_KEYWORDS = frozenset(
    {
        # Arguments that carry no information which the pass does not have, or that only ask for extra outputs.
        "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
        "cache_position", "past_key_value", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
        "max_length_k", "head_mask", "layer_head_mask", "attention_dropout", "target_dtype", "output_router_logits",
        "position_embeddings", "num_items_in_batch", "deterministic",
    }
)  # fmt: skip

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""One layer's, `[kv_heads, k, key_dim]` and `[kv_heads, k, value_dim]`."""


class UnsupportedAttentionError(RuntimeError):
    """The model asks its attention for something that this function does not do."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's keys and values look like."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class PassContext:
    """What the attention function needs and the model does not hand it.

    `prefixes[prompt][layer]` are given keys and values, in the backbone's dtype. `layer_of` maps a module to its place
    in the order of calls. While `probe` is a list, calls record their shapes there and answer causally. While
    `captured` is a list, calls leave the keys and values of all their tokens there, `[heads, T, dim]`.
    """

    groups: Sequence[RowGroup] = ()
    prefixes: dict[int, Sequence[KeysValues]] = field(default_factory=dict)
    layer_of: dict[int, int] = field(default_factory=dict)
    probe: list[tuple[torch.nn.Module, LayerShape]] | None = None
    captured: list[KeysValues] | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the groups of the running pass.

    `query [1, heads, T, key_dim]`, `key [1, kv_heads, T, key_dim]`, `value [1, kv_heads, T, value_dim]`; returns
    `[1, T, heads, value_dim]`. Raises UnsupportedAttentionError for arguments that it would have to leave out.
    """
    context: PassContext = getattr(module, CONTEXT_ATTRIBUTE)
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model builds an attention mask of its own")
    if dropout:
        raise UnsupportedAttentionError("the model drops attention weights: it is not in eval mode")
    layer = _Layer(
        scaling=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        window=kwargs.pop("sliding_window", None),
        softcap=kwargs.pop("softcap", None),
        sinks=kwargs.pop("s_aux", None),
    )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _NEUTRAL_KEYWORDS]
    if unknown:
        raise UnsupportedAttentionError(f"the model passes {', '.join(sorted(unknown))} to its attention")
    queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim] each
    if context.probe is not None:
        shape = LayerShape(keys.shape[1], keys.shape[2], values.shape[2])
        context.probe.append((module, shape))
        whole = RowGroup(num_tokens=len(queries), num_rows=1, max_length=len(queries))
        return _attend_group(queries, keys, values, (), whole, layer).unsqueeze(0), None
    if context.captured is not None:
        context.captured.append((key[0], value[0]))
    given = {prompt: layers[context.layer_of[id(module)]] for prompt, layers in context.prefixes.items()}
    answers = _attend_groups(queries, keys, values, context.groups, given, layer)
    return answers.unsqueeze(0), None


def _attend_groups(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: Sequence[RowGroup],
    given: dict[int, KeysValues],
    layer: _Layer,
) -> torch.Tensor:
    """All groups of the pass, in order; those of virtual tokens come first. `[T, heads, value_dim]`."""
    prefixes = {prompt: (k.transpose(0, 1), v.transpose(0, 1)) for prompt, (k, v) in given.items()}
    sizes = [group.num_tokens for group in groups]
    # Split once: a slice a group would have a gradient as large as the whole, each.
    parts = zip(groups, *(torch.split(part, sizes) for part in (queries, keys, values)), strict=True)
    answers = []
    for group, query, key, value in parts:
        if group.virtual_prompts:
            rows = zip(_pad(key, group).unbind(0), _pad(value, group).unbind(0), strict=True)
            prefixes.update(zip(group.virtual_prompts, rows, strict=True))
        front = [prefixes[prompt] for prompt, _ in group.prompt_runs] if group.num_prefix else []
        answers.append(_attend_group(query, key, value, front, group, layer))
    return torch.cat(answers) if len(answers) > 1 else answers[0]


def _attend_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefixes: Sequence[KeysValues],
    group: RowGroup,
    layer: _Layer,
) -> torch.Tensor:
    """Answers `[num_tokens, heads, value_dim]`. `prefixes` are those of the runs, `[k, kv_heads, dim]` each."""
    keys, values = _pad(key, group), _pad(value, group)
    if prefixes:
        keys = _behind([k for k, _ in prefixes], keys, group)
        values = _behind([v for _, v in prefixes], values, group)
    # A window that no row of the group reaches is no window: one mask fewer.
    columns = group.num_prefix + group.max_length
    window = layer.window if layer.window is not None and layer.window < columns else None
    answers = _attend(
        _pad(query, group).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        group.visible(window, query.device),
        layer,
    )
    return _unpad(answers.transpose(1, 2), group)


def _behind(prefixes: Sequence[torch.Tensor], own: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """`own [rows, L, kv_heads, dim]` with each row's prefix in front: `[rows, k + L, kv_heads, dim]`.

    Rows of one prompt take it by expansion: its gradient is then one sum over them, in fp32 inside.
    """
    expanded = [
        prefix.unsqueeze(0).expand(count, -1, -1, -1)
        for prefix, (_, count) in zip(prefixes, group.prompt_runs, strict=True)
    ]
    return torch.cat([torch.cat(expanded) if len(expanded) > 1 else expanded[0], own], dim=1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, layer: _Layer
) -> torch.Tensor:
    """`query [rows, heads, L, dim]`, keys and values `[rows, kv_heads, C, dim]`: `[rows, heads, L, value_dim]`."""
    rows, heads, length, _ = query.shape
    if layer.softcap is not None or layer.sinks is not None:
        return _attend_unusually(query, key, value, visible, layer)
    if query.device.type != "cpu" or rows * heads * visible.numel() > _MAX_SCORES:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=layer.scaling, enable_gqa=heads != key.shape[1]
        )
    # Queries that share a head's keys are one matrix: [rows * kv_heads, group * L, dim].
    flat_keys, flat_values = key.flatten(0, 1), value.flatten(0, 1)
    grouped = query.reshape(len(flat_keys), -1, query.shape[3])
    answers = _products(grouped, flat_keys, flat_values, visible, layer.scaling)
    return answers.view(rows, heads, length, -1)


class _Products(torch.autograd.Function):
    """Attention as plain batched products, its weights computed again in the backward pass.

    On the CPU torch's fused kernel is made for long rows: on rows of 50 tokens in bf16 its backward pass took 16 times
    as long as these.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, visible)
        ctx.scaling = scaling
        return torch.bmm(_weights(query, key, visible, scaling).to(value.dtype), value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, visible = ctx.saved_tensors
        weights = _weights(query, key, visible, ctx.scaling)
        grad_value = torch.bmm(weights.to(value.dtype).transpose(1, 2), grads[0])
        slope = torch.bmm(grads[0], value.transpose(1, 2)).float().mul_(weights)
        slope.sub_(weights.mul_(slope.sum(dim=-1, keepdim=True))).mul_(ctx.scaling)
        slope = slope.to(query.dtype)
        return torch.bmm(slope, key), torch.bmm(slope.transpose(1, 2), query), grad_value, None, None


def _weights(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, scaling: float) -> torch.Tensor:
    """`query [n, group * L, dim]`, `key [n, C, dim]`: `[n, group * L, C]`, fp32."""
    scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scaling)
    scores.view(len(query), -1, *visible.shape).masked_fill_(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1)


_products: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor] = _Products.apply


def _attend_unusually(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, layer: _Layer
) -> torch.Tensor:
    """Soft caps and sinks, step by step in fp32."""
    rows, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, kv_heads, -1, length, dim)
    scores = torch.matmul(grouped.float(), key.float().unsqueeze(2).transpose(3, 4)) * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if layer.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = layer.sinks.float().reshape(1, kv_heads, -1, 1, 1).expand(rows, -1, -1, length, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    answers = torch.matmul(weights, value.float().unsqueeze(2))
    return answers.reshape(rows, heads, length, -1).to(query.dtype)


class _Scatter(torch.autograd.Function):
    """Rows of a tensor put to distinct places among zeros. Its gradient is a gather, and no sum."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, slots: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return tokens.new_zeros((size, *tokens.shape[1:])).index_copy_(0, slots, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots), None, None


class _Gather(torch.autograd.Function):
    """Rows of a tensor at distinct places. Its gradient is a scatter, and no sum."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.size = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grads[0].new_zeros((ctx.size, *grads[0].shape[1:])).index_copy_(0, slots, grads[0]), None


_scatter: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = _Scatter.apply
_gather: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _Gather.apply


def _pad(tokens: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """`[num_tokens, heads, dim]` as `[rows, L, heads, dim]`."""
    if group.slots is not None:
        tokens = _scatter(tokens, group.slots, group.num_rows * group.max_length)
    return tokens.reshape(group.num_rows, group.max_length, *tokens.shape[1:])


def _unpad(padded: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """`[rows, L, heads, dim]` as `[num_tokens, heads, dim]`."""
    flat = padded.reshape(-1, *padded.shape[2:])
    return _gather(flat, group.slots) if group.slots is not None else flat


AttentionInterface.register(ATTENTION_NAME, packed_attention)
