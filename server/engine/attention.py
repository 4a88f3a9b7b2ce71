"""The attention function that every packed backbone runs: each row reads its own pages and no other.

It is registered with transformers' `AttentionInterface` under `ATTENTION_NAME`, so that any decoder calls it
unchanged. The step's index tensors reach it through the `StepContext` that the backbone hangs on its modules at load:
not through a global, and not through keywords, which some model forwards drop. The name has no entry among
transformers' mask functions, so no mask is built by the model; what a token sees follows from the plan alone. The work
itself is done by a kernel (`server.engine.kernels`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from server.engine.kernels.batch import LayerAttention, PagedBatch
from server.engine.kernels.gather import answer_alone
from server.engine.kv import KvPool, LayerShape

ATTENTION_NAME = "promptmux"

CONTEXT_ATTRIBUTE = "promptmux_context"

Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, LayerAttention], torch.Tensor
]
"""`(query, key, value, key_pages, value_pages, batch, layer) -> answers`, as `kernels.gather.gather_attention`."""

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
class StepContext:
    """What the attention function needs and the model does not hand it. One an engine's backbone.

    `layer_of` maps a module to its place in the order of calls. While `probe` is a list, calls record their shapes
    there and answer causally within the batch, without any pool: that is how a backbone's layers are discovered at
    load.
    """

    kernel: Kernel
    pool: KvPool | None = None
    batch: PagedBatch | None = None
    probe: list[LayerShape] | None = None
    layer_of: dict[int, int] = field(default_factory=dict)
    num_windowed: int = 0
    num_calls: int = 0


def attach_context(model: torch.nn.Module, context: StepContext) -> None:
    """Hang the context on every module, where the attention function finds it."""
    for module in model.modules():
        object.__setattr__(module, CONTEXT_ATTRIBUTE, context)


@contextmanager
def attention_set_to(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model attends by the function of this name within the block, and by what it had before behind it."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim] each
    if context.probe is not None:
        context.layer_of[id(module)] = len(context.probe)
        context.probe.append(LayerShape(keys.shape[1], keys.shape[2], values.shape[2]))
        context.num_windowed += layer.sliding_window is not None
        # Some models view the answers in another shape, which only contiguous ones allow.
        return answer_alone(queries, keys, values, layer).contiguous().unsqueeze(0), None
    if context.pool is None or context.batch is None:
        raise RuntimeError("a forward pass without a plan")
    index = context.layer_of[id(module)]
    pool = context.pool
    answers = context.kernel(
        queries, keys, values, pool.key_pages[index], pool.value_pages[index], context.batch, layer
    )
    return answers.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
