"""The two ways of running one step of a plan through a frozen model: packed, and dense.

Packed: all tokens of the step in one sequence `[1, T, hidden_size]`, the registered attention function reads each row's
pages. Any decoder that calls transformers' attention interface can run so, unchanged.

Dense: for models that compute attention by themselves (gptj, bloom, mpt, falcon and others). Decoding rows are put
into one left-padded batch with a transformers cache filled from their pages, chunks of prompts run one by one; what
the model added to the cache is written back to the pages. Slower, because keys and values are copied every step, but
it takes the same plan, the same pages, the same isolation check and the same gate.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from server.engine.attention import StepContext
from server.engine.cuda_graphs import Capture, DecodeBuffers, DecodeGraphs, take_sampled
from server.engine.kernels.batch import PagedBatch
from server.engine.kernels.gather import read_columns, write_kv
from server.engine.kv import KeysValues, KvPool, LayerShape, num_pages_for
from server.engine.plan import NO_SOURCE, IntArray, PlanEntry, StepPlan
from server.engine.transfers import upload


class Forward(Protocol):
    """Runs a plan: writes the step's keys and values into the pool, returns the logits `[L, vocab_size]`.

    `sampled` are the tokens of the last sample, on the device, where the plan takes some of them.
    """

    layers: tuple[LayerShape, ...]

    def run(self, pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor: ...


class Compiled(Protocol):
    """`server.engine.compiled.CompiledForward`, as much as is needed of it here."""

    def run(
        self,
        eager: Callable[[], torch.Tensor],
        embeds: torch.Tensor,
        positions: torch.Tensor,
        logits_tokens: torch.Tensor,
        pool: KvPool,
        batch: PagedBatch,
    ) -> torch.Tensor: ...


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
        self.decode_tokens: int | None = None
        """Every step of decoding rows alone is padded to so many tokens: one shape, whoever shares the batch."""
        self.compiled: Compiled | None = None
        """Another way to compute a step, used where it is the faster one."""
        self._graphs: DecodeGraphs | None = None
        self._graphs_pool: KvPool | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.layers = self._discover_layers()

    def capture(self, pool: KvPool, *, max_rows: int, max_columns: int, capture: Capture | None = None) -> None:
        """Serve decode steps over `pool` by CUDA graphs from now on (`capture` None), or by what `capture` makes of a
        pass. Takes seconds a bucket; raises RuntimeError for a model that cannot be captured.
        """

        def forward(buffers: DecodeBuffers) -> torch.Tensor:
            embeds = embed(self._model, buffers.token_ids)
            return self._with_step(pool, buffers.batch, embeds, buffers.positions, buffers.logits_tokens)

        graphs = DecodeGraphs(
            forward, device=self._model.device, max_rows=max_rows, max_columns=max_columns, capture=capture
        )
        graphs.warm_up()
        self._graphs, self._graphs_pool = graphs, pool

    def run(self, pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        if self._graphs is not None and self._graphs_pool is pool and self._graphs.can_replay(plan):
            return self._graphs.replay(plan, sampled)
        device = self._model.device
        num_padding = self._num_padding(plan)
        token_ids, sources, positions, logits_tokens = upload(
            [
                _padded(plan.token_ids, num_padding, 0),
                _padded(plan.token_sources, num_padding, NO_SOURCE),
                _padded(plan.positions, num_padding, 0),
                _padded(plan.logits_tokens, num_padding, 0),
            ],
            device,
        )
        if plan.takes_samples:
            token_ids = take_sampled(token_ids, sources, sampled)
        embeds = embed(self._model, token_ids)
        for entry, first in zip(plan.entries, plan.query_starts[:-1].tolist(), strict=True):
            if entry.vectors is not None:
                embeds = embeds.clone()
                embeds[first : first + entry.num_tokens] = entry.vectors.to(embeds)
        batch = plan.batch(device, num_padding)

        def eager() -> torch.Tensor:
            return self._with_step(pool, batch, embeds, positions, logits_tokens)

        if self.compiled is not None and len(logits_tokens):
            logits = self.compiled.run(eager, embeds, positions, logits_tokens, pool, batch)
        else:
            logits = eager()
        return logits[: len(plan.logits_tokens)]

    def _with_step(
        self,
        pool: KvPool,
        batch: PagedBatch,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        logits_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Call the model with the step where its attention finds it."""
        self._context.pool = pool
        self._context.batch = batch
        try:
            return self._call(embeds, positions, logits_tokens)
        finally:
            self._context.batch = None
            self._context.pool = None

    def _num_padding(self, plan: StepPlan) -> int:
        """Padding tokens behind the plan's own, which are written nowhere and whose logits nobody takes."""
        if self.decode_tokens is None or plan.num_decoding < len(plan.entries):
            return 0
        return max(0, self.decode_tokens - plan.num_tokens)

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


def _padded(array: IntArray, num_padding: int, padding: int) -> IntArray:
    return np.pad(array, (0, num_padding), constant_values=padding) if num_padding else array


class DenseForward:
    """Left-padded batches with a transformers cache. Raises UnsupportedModelError for models with other state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.layers = self._discover_layers()

    def run(self, pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        if plan.takes_samples:
            raise RuntimeError("the dense path takes its tokens from the host")
        starts = plan.query_starts.tolist()
        decoding = list(range(plan.num_decoding))
        logits_of: dict[int, torch.Tensor] = {}
        for rows in [decoding, *([row] for row in range(plan.num_decoding, len(plan.entries)))]:
            if rows:
                answers = self._run_rows(pool, plan, rows)
                for answer, row in zip(answers, rows, strict=True):
                    logits_of.update({starts[row] + i: answer[i] for i in range(len(answer))})
        wanted = plan.logits_tokens.tolist()
        if not wanted:
            return torch.empty(0, 0)
        return torch.stack([logits_of[token] for token in wanted])

    def _run_rows(self, pool: KvPool, plan: StepPlan, rows: Sequence[int]) -> torch.Tensor:
        """Run rows with equally many tokens together. Returns logits `[len(rows), n, vocab_size]`."""
        device = self._model.device
        entries = [plan.entries[row] for row in rows]
        n = entries[0].num_tokens
        past = max(entry.start_column for entry in entries)
        cache = DynamicCache()
        if past:
            for layer in range(pool.num_layers):
                keys = self._padded(pool.key_pages[layer], plan, rows, past)
                values = self._padded(pool.value_pages[layer], plan, rows, past)
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
        first = int(plan.query_starts[rows[0]])
        write_slots = torch.from_numpy(plan.write_slots[first : first + len(rows) * n]).to(device)
        for layer in range(pool.num_layers):
            new = [t[:, :, -n:].transpose(1, 2).flatten(0, 1) for t in _cached(cache, layer)]  # [rows * n, heads, dim]
            write_kv(new[0], new[1], pool.key_pages[layer], pool.value_pages[layer], write_slots)
        logits: torch.Tensor = output.logits
        return logits

    def _padded(self, pages: torch.Tensor, plan: StepPlan, rows: Sequence[int], past: int) -> torch.Tensor:
        """The rows' past keys or values, right-aligned: `[len(rows), kv_heads, past, dim]`."""
        padded = pages.new_zeros((len(rows), pages.shape[1], past, pages.shape[3]))
        for i, row in enumerate(rows):
            length = plan.entries[row].start_column
            if length:
                numbers = torch.from_numpy(plan.page_table[row, : num_pages_for(length)]).long().to(pages.device)
                padded[i, :, past - length :] = read_columns(pages, numbers, length)
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
    """The logits `[num_logits, vocab_size]` of one row alone, by the model's own attention: no plan, no page.

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
