"""The attention function that every packed backbone runs: each row reads its own slot and no other.

It is registered with transformers' `AttentionInterface` under `ATTENTION_NAME`, so that any decoder calls it
unchanged. The step's plan reaches it through the `StepContext` that the backbone hangs on its modules at load: not
through a global, and not through keywords, which some model forwards drop. The name has no entry among transformers'
mask functions, so no mask is built by the model; the masks here follow from the plan's lengths alone.

Per layer: this step's keys and values are written to their slots, then each slab's decoding rows are answered in one
batched product over the slab (grouped queries as `[rows, kv_heads, group, head_dim]`, keys never repeated), and each
chunk of a client's prompt is answered against its own slot.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from server.engine.kv import KvCache, LayerShape, SlabTensors
from server.engine.plan import DecodeRead, PrefillRead, StepPlan

ATTENTION_NAME = "promptmux"

CONTEXT_ATTRIBUTE = "promptmux_context"

_NEUTRAL_KEYWORDS = frozenset(
    {
        # Arguments that carry no information which the plan does not have, or that only ask for extra outputs.
        "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
        "cache_position", "past_key_value", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
        "max_length_k", "head_mask", "layer_head_mask", "attention_dropout", "target_dtype", "output_router_logits",
        "position_embeddings", "num_items_in_batch", "deterministic",
    }
)  # fmt: skip


class UnsupportedAttentionError(RuntimeError):
    """The model asks its attention for something that this function does not do; the gate turns it away."""


@dataclass(slots=True)
class LayerAttention:
    """How one layer attends, beyond its shapes: read off the first call."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(slots=True)
class StepContext:
    """What the attention function needs and the model does not hand it. One an engine's backbone.

    `layer_of` maps a module to its place in the order of calls. While `probe` is a list, calls record their shapes
    there and answer causally within the batch, without any cache: that is how a backbone's layers are discovered at
    load.
    """

    kv: KvCache | None = None
    plan: StepPlan | None = None
    probe: list[LayerShape] | None = None
    layer_of: dict[int, int] = field(default_factory=dict)
    num_windowed: int = 0
    num_calls: int = 0


def attach_context(model: torch.nn.Module, context: StepContext) -> None:
    """Hang the context on every module, where the attention function finds it."""
    for module in model.modules():
        object.__setattr__(module, CONTEXT_ATTRIBUTE, context)


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
    """Attend over the packed batch of the current plan.

    `query [1, heads, T, key_dim]`, `key [1, kv_heads, T, key_dim]`, `value [1, kv_heads, T, value_dim]`, any float
    dtype; returns `[1, T, heads, value_dim]`. Raises UnsupportedAttentionError for arguments that would change the
    result in a way this function does not know.
    """
    context: StepContext = getattr(module, CONTEXT_ATTRIBUTE)
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model builds an attention mask of its own")
    layer = LayerAttention(
        scaling=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        sliding_window=kwargs.pop("sliding_window", None),
        softcap=kwargs.pop("softcap", None),
        sinks=kwargs.pop("s_aux", None),
    )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _NEUTRAL_KEYWORDS]
    if unknown:
        raise UnsupportedAttentionError(f"the model passes {', '.join(sorted(unknown))} to its attention")
    context.num_calls += 1
    if context.probe is not None:
        context.layer_of[id(module)] = len(context.probe)
        context.probe.append(LayerShape(key.shape[1], key.shape[3], value.shape[3]))
        context.num_windowed += layer.sliding_window is not None
        length = query.shape[2]
        mask = _visible(length, 0, length, layer.sliding_window, query.device)
        return _attend(query, key, value, _additive(mask, query.dtype), layer).transpose(1, 2), None
    if context.plan is None or context.kv is None:
        raise RuntimeError("a forward pass without a plan")
    answers = _attend_plan(context.kv, context.plan, context.layer_of[id(module)], query, key, value, layer)
    return answers.unsqueeze(0), None


def _attend_plan(
    kv: KvCache,
    plan: StepPlan,
    layer_index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: LayerAttention,
) -> torch.Tensor:
    """Write this layer's keys and values, then answer every token. Returns `[T, heads, value_dim]`."""
    queries = query[0].transpose(0, 1)  # [T, heads, key_dim]
    keys = key[0].transpose(0, 1)  # [T, kv_heads, key_dim]
    values = value[0].transpose(0, 1)  # [T, kv_heads, value_dim]
    for write in plan.writes:
        slab = kv.slabs[write.slab]
        tokens, slots, columns = (_tensor(a, query.device) for a in (write.tokens, write.slots, write.columns))
        whole = len(write.tokens) == plan.num_tokens
        slab.keys[layer_index][slots, :, columns] = keys if whole else keys[tokens]
        slab.values[layer_index][slots, :, columns] = values if whole else values[tokens]
    answers = torch.empty((plan.num_tokens, queries.shape[1], values.shape[2]), dtype=query.dtype, device=query.device)
    for index, decode in enumerate(plan.decode_reads):
        _answer_decode(kv.slabs[decode.slab], plan, index, decode, layer_index, queries, answers, layer)
    for index, prefill in enumerate(plan.prefill_reads):
        _answer_prefill(kv.slabs[prefill.slab], plan, index, prefill, layer_index, queries, answers, layer)
    return answers


def _answer_decode(
    slab: SlabTensors,
    plan: StepPlan,
    index: int,
    read: DecodeRead,
    layer_index: int,
    queries: torch.Tensor,
    answers: torch.Tensor,
    layer: LayerAttention,
) -> None:
    device = queries.device
    n, length = read.num_slots, read.max_length
    slots = slice(read.first_slot, read.first_slot + n)
    keys = slab.keys[layer_index][slots, :, :length]  # [n, kv_heads, length, key_dim]
    values = slab.values[layer_index][slots, :, :length]
    first = int(read.result_tokens[0])
    asked = queries[first : first + n] if read.is_dense else queries[_tensor(read.query_tokens, device)]
    grouped = asked.reshape(n, keys.shape[1], -1, asked.shape[-1])  # [n, kv_heads, group, key_dim]
    mask = plan.masks.get(("decode", index, layer.sliding_window))
    if mask is None:
        columns = torch.arange(length, device=device)
        lengths = _tensor(read.lengths, device)[:, None]
        visible = columns < lengths
        if layer.sliding_window is not None:
            visible &= columns >= lengths - layer.sliding_window
        mask = _additive(visible[:, None, None, :], queries.dtype)  # [n, 1, 1, length]
        plan.masks["decode", index, layer.sliding_window] = mask
    answered = _attend_grouped(grouped, keys, values, mask, layer).reshape(n, asked.shape[1], -1)
    if read.is_dense:
        answers[first : first + n] = answered
    else:
        answers[_tensor(read.result_tokens, device)] = answered[_tensor(read.result_slots, device)]


def _answer_prefill(
    slab: SlabTensors,
    plan: StepPlan,
    index: int,
    read: PrefillRead,
    layer_index: int,
    queries: torch.Tensor,
    answers: torch.Tensor,
    layer: LayerAttention,
) -> None:
    end = read.start_column + read.num_tokens
    keys = slab.keys[layer_index][read.slot : read.slot + 1, :, :end]  # [1, kv_heads, end, key_dim]
    values = slab.values[layer_index][read.slot : read.slot + 1, :, :end]
    tokens = slice(read.first_token, read.first_token + read.num_tokens)
    mask = plan.masks.get(("prefill", index, layer.sliding_window))
    if mask is None:
        visible = _visible(read.num_tokens, read.start_column, end, layer.sliding_window, queries.device)
        mask = _additive(visible, queries.dtype)  # [num_tokens, end]
        plan.masks["prefill", index, layer.sliding_window] = mask
    asked = queries[tokens].transpose(0, 1).unsqueeze(0)  # [1, heads, num_tokens, key_dim]
    answers[tokens] = _attend(asked, keys, values, mask, layer)[0].transpose(0, 1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, layer: LayerAttention
) -> torch.Tensor:
    """`query [b, heads, t, d]` over `key [b, kv_heads, s, d]`: heads are grouped, keys are not repeated."""
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    if layer.softcap is None and layer.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=layer.scaling, enable_gqa=heads != kv_heads
        )
    group = heads // kv_heads
    grouped = query.reshape(batch, kv_heads, group * length, -1)
    answered = _softmax_attention(grouped, key, value, mask.repeat(group, 1), layer, rows_per_head=length)
    return answered.reshape(batch, heads, length, -1)


def _attend_grouped(
    grouped: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, layer: LayerAttention
) -> torch.Tensor:
    """`grouped [n, kv_heads, group, d]`, one query a head, over `key [n, kv_heads, s, d]`; mask `[n, 1, 1, s]`."""
    # In half precision the fused kernel wins on CPU; in fp32 two batched products do (measured, docs/log.md).
    if layer.softcap is None and layer.sinks is None and grouped.dtype != torch.float32:
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=layer.scaling)
    return _softmax_attention(grouped, key, value, mask, layer, rows_per_head=1)


def _softmax_attention(
    grouped: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    layer: LayerAttention,
    *,
    rows_per_head: int,
) -> torch.Tensor:
    """Attention spelled out, with soft cap (Gemma 2) and attention sinks (gpt-oss). Softmax in fp32.

    `grouped [b, kv_heads, group * rows_per_head, d]`, the heads of a group one after the other.
    """
    scores = torch.matmul(grouped, key.transpose(-1, -2)) * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.float() + mask.float()
    if layer.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = layer.sinks.float().repeat_interleave(rows_per_head).reshape(1, key.shape[1], -1, 1)
        sinks = sinks.expand(scores.shape[0], -1, -1, -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


def _visible(
    num_tokens: int, start_column: int, end: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor:
    """Boolean `[num_tokens, end]`: token i, at column `start_column + i`, sees the columns up to its own."""
    own = torch.arange(start_column, start_column + num_tokens, device=device)[:, None]
    columns = torch.arange(end, device=device)
    visible = columns <= own
    if sliding_window is not None:
        visible &= columns > own - sliding_window
    return visible


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _tensor(array: Any, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
