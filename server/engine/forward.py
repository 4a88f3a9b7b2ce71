"""The two ways of running one step of a plan through a frozen model: packed, and dense.

Packed: all tokens of the step in one sequence `[1, T, hidden_size]`, the registered attention function reads each row's
slot. Any decoder that calls transformers' attention interface can run so, unchanged.

Dense: for models that compute attention by themselves (gptj, bloom, mpt, falcon and others). Decoding rows are put
into one left-padded batch with a transformers cache filled from their slots, chunks of prompts run one by one; what
the model added to the cache is written back to the slots. Slower, because keys and values are copied every step, but
it takes the same plan, the same slots, the same isolation check and the same gate.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from server.engine.attention import StepContext
from server.engine.kv import KeysValues, KvCache, LayerShape
from server.engine.plan import PlanEntry, StepPlan


class Forward(Protocol):
    """Runs a plan: writes the step's keys and values into the slots, returns the logits `[L, vocab_size]`."""

    layers: tuple[LayerShape, ...]

    def run(self, kv: KvCache, plan: StepPlan) -> torch.Tensor: ...


class UnsupportedModelError(RuntimeError):
    """The model can be served in neither way; the message says why."""


def embed(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Input embeddings `[n, hidden_size]` of the token ids `[n]`, as the model itself looks them up."""
    embedded: torch.Tensor = model.get_input_embeddings()(token_ids)
    return embedded


class PackedForward:
    """One packed sequence a step. Raises UnsupportedModelError when the model does not call the attention function."""

    def __init__(self, model: PreTrainedModel, context: StepContext) -> None:
        self._model = model
        self._context = context
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.layers = self._discover_layers()

    def run(self, kv: KvCache, plan: StepPlan) -> torch.Tensor:
        device = self._model.device
        embeds = embed(self._model, torch.from_numpy(plan.token_ids).to(device))
        for entry, first in zip(plan.entries, plan.first_tokens.tolist(), strict=True):
            if entry.vectors is not None:
                embeds = embeds.clone()
                embeds[first : first + entry.num_tokens] = entry.vectors.to(embeds)
        logits_tokens = torch.from_numpy(plan.logits_tokens).to(device)
        self._context.kv = kv
        self._context.plan = plan
        try:
            return self._call(embeds, torch.from_numpy(plan.positions).to(device), logits_tokens)
        finally:
            self._context.plan = None
            self._context.kv = None

    def _call(self, embeds: torch.Tensor, positions: torch.Tensor, logits_tokens: torch.Tensor) -> torch.Tensor:
        kwargs: dict[str, Any] = {}
        # An index of no tokens still runs the head once over nothing in some models and fails in others: ask for one.
        wanted = logits_tokens if len(logits_tokens) else logits_tokens.new_zeros(1)
        if self._keeps_logits:
            kwargs["logits_to_keep"] = wanted
        output = self._model(
            inputs_embeds=embeds.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **kwargs
        )
        logits: torch.Tensor = output.logits[0] if self._keeps_logits else output.logits[0][wanted]
        return logits[: len(logits_tokens)]

    def _discover_layers(self) -> tuple[LayerShape, ...]:
        """Run a few tokens once and see which modules call the attention function, in which shapes."""
        device = self._model.device
        self._context.probe = []
        try:
            ids = torch.zeros(3, dtype=torch.long, device=device)
            self._call(embed(self._model, ids), torch.arange(3, device=device), torch.tensor([2], device=device))
            layers = tuple(self._context.probe)
        finally:
            self._context.probe = None
        if not layers:
            raise UnsupportedModelError("the model never calls the attention interface")
        if len(self._context.layer_of) != len(layers):
            raise UnsupportedModelError("a module of the model attends more than once a pass")
        return layers


class DenseForward:
    """Left-padded batches with a transformers cache. Raises UnsupportedModelError for models with other state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.layers = self._discover_layers()

    def run(self, kv: KvCache, plan: StepPlan) -> torch.Tensor:
        entries = list(zip(plan.entries, plan.first_tokens.tolist(), strict=True))
        decoding = [(entry, first) for entry, first in entries if entry.num_tokens == 1]
        chunks = [(entry, first) for entry, first in entries if entry.num_tokens > 1]
        logits_of: dict[int, torch.Tensor] = {}
        if decoding:
            answers = self._run_batch(kv, [entry for entry, _ in decoding])
            logits_of.update({first: answers[i, -1] for i, (_, first) in enumerate(decoding)})
        for entry, first in chunks:
            answers = self._run_batch(kv, [entry])
            logits_of.update({first + i: answers[0, i] for i in range(entry.num_tokens)})
        wanted = plan.logits_tokens.tolist()
        if not wanted:
            return torch.empty(0, 0)
        return torch.stack([logits_of[token] for token in wanted])

    def _run_batch(self, kv: KvCache, entries: Sequence[PlanEntry]) -> torch.Tensor:
        """Run entries of equal length together. Returns logits `[len(entries), n, vocab_size]`."""
        device = self._model.device
        n = entries[0].num_tokens
        past = max(entry.start_column for entry in entries)
        cache = DynamicCache()
        if past:
            for layer, shape in enumerate(self.layers):
                keys = self._padded(kv, entries, layer, past, shape.kv_heads, shape.key_dim, "keys")
                values = self._padded(kv, entries, layer, past, shape.kv_heads, shape.value_dim, "values")
                cache.update(keys, values, layer)
        mask = torch.ones((len(entries), past + n), dtype=torch.long, device=device)
        for i, entry in enumerate(entries):
            mask[i, : past - entry.start_column] = 0
        embeds = torch.stack([self._embeds(entry) for entry in entries])
        kwargs: dict[str, Any] = {}
        if self._takes_positions:
            starts = torch.tensor([entry.start_column for entry in entries], device=device)
            kwargs["position_ids"] = starts[:, None] + torch.arange(n, device=device)
        output = self._model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        for layer in range(len(self.layers)):
            keys, values = _cached(cache, layer)
            new_keys, new_values = keys[:, :, -n:], values[:, :, -n:]
            for i, entry in enumerate(entries):
                slab = kv.slabs[entry.slot.slab]
                columns = slice(entry.start_column, entry.start_column + n)
                slab.keys[layer][entry.slot.index, :, columns] = new_keys[i]
                slab.values[layer][entry.slot.index, :, columns] = new_values[i]
        logits: torch.Tensor = output.logits
        return logits

    def _padded(
        self, kv: KvCache, entries: Sequence[PlanEntry], layer: int, past: int, heads: int, dim: int, which: str
    ) -> torch.Tensor:
        """The rows' past keys or values, right-aligned: `[len(entries), heads, past, dim]`."""
        padded = torch.zeros((len(entries), heads, past, dim), dtype=self._model.dtype, device=self._model.device)
        for i, entry in enumerate(entries):
            slot = getattr(kv.slabs[entry.slot.slab], which)[layer][entry.slot.index]
            padded[i, :, past - entry.start_column :] = slot[:, : entry.start_column]
        return padded

    def _embeds(self, entry: PlanEntry) -> torch.Tensor:
        if entry.vectors is not None:
            return entry.vectors.to(device=self._model.device, dtype=self._model.dtype)
        return embed(self._model, torch.tensor(list(entry.token_ids), device=self._model.device))

    def _discover_layers(self) -> tuple[LayerShape, ...]:
        ids = torch.zeros(3, dtype=torch.long, device=self._model.device)
        cache = DynamicCache()
        try:
            self._model(inputs_embeds=embed(self._model, ids).unsqueeze(0), past_key_values=cache, use_cache=True)
            cached = [_cached(cache, layer) for layer in range(len(cache.layers))]
            layers = tuple(LayerShape(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in cached)
        except Exception as error:
            raise UnsupportedModelError(
                f"the model keeps other state than keys and values a layer ({type(error).__name__}: {error})"
            ) from error
        if not layers:
            raise UnsupportedModelError("the model keeps other state than keys and values a layer (it caches none)")
        return layers


def _cached(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's keys and values `[batch, kv_heads, length, dim]`."""
    held: Any = cache.layers[layer]
    return held.keys, held.values


def reference_logits(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    vectors: torch.Tensor | None = None,
    prefix: KeysValues | None = None,
    num_logits: int | None = None,
) -> torch.Tensor:
    """The logits `[num_logits, vocab_size]` of one row alone, by the model's own attention: no plan, no slot.

    They are those of its last `num_logits` tokens, by default of all of them. `vectors [k, hidden_size]` are prepended
    to the input embeddings (Lester 2021); `prefix` fills the past of every
    layer (Li & Liang 2021). This is what tests, gate and audit compare the packed path with; the caller has set the
    model to its own attention.
    """
    device = model.device
    embeds = embed(model, torch.tensor(list(token_ids), dtype=torch.long, device=device)).unsqueeze(0)
    kwargs: dict[str, Any] = {}
    wanted = num_logits if num_logits is not None else len(token_ids)
    if vectors is not None:
        embeds = torch.cat([vectors.to(embeds).unsqueeze(0), embeds], dim=1)
    parameters = inspect.signature(model.forward).parameters
    if "logits_to_keep" in parameters:
        kwargs["logits_to_keep"] = wanted
    if "position_ids" in parameters:
        start = prefix.num_tokens if prefix is not None else 0
        kwargs["position_ids"] = torch.arange(start, start + embeds.shape[1], device=device).unsqueeze(0)
    if prefix is not None:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys.unsqueeze(0), values.unsqueeze(0), layer)
        total = prefix.num_tokens + embeds.shape[1]
        mask = torch.ones((1, total), dtype=torch.long, device=device)
        output = model(inputs_embeds=embeds, past_key_values=cache, attention_mask=mask, use_cache=True, **kwargs)
    else:
        output = model(inputs_embeds=embeds, use_cache=False, **kwargs)
    logits: torch.Tensor = output.logits[0, -wanted:]
    return logits
