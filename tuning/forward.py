"""One packed, differentiable pass of many prompts' rows through a frozen backbone.

Owns what a pass needs of the model and takes away again: its attention function, the borders between its layers, and
activation checkpointing (Chen et al. 2016) around them, which works with given keys and values too. Between two layers,
forward and backward, the caller's `boundary` is called with the model as it was before the pass, so that somebody else
may run it there. Refuses to know losses, methods and optimizers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tuning.attention import (
    ATTENTION_NAME,
    CONTEXT_ATTRIBUTE,
    KeysValues,
    LayerShape,
    PassContext,
    UnsupportedAttentionError,
)
from tuning.packing import PackedBatch
from tuning.records import UnsupportedBackboneError

PromptValues = torch.Tensor | Sequence[KeysValues]
"""A prompt in a pass: vectors `[k, d]`, or a layer's keys and values each, in the backbone's dtype."""

_IMPLEMENTATION = "_attn_implementation_internal"


def embed(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Input embeddings `[n, d]` of token ids `[n]`, as the model itself looks them up; no gradient."""
    with torch.no_grad():
        embedded: torch.Tensor = model.get_input_embeddings()(token_ids)
    return embedded


def by_layer(keys_values: torch.Tensor, dtype: torch.dtype) -> list[KeysValues]:
    """`[layers, 2, kv_heads, k, head_dim]` of any float dtype as a pass takes it; gradients flow back."""
    return [(keys, values) for keys, values in (layer.unbind(0) for layer in keys_values.to(dtype).unbind(0))]


class PackedPass:
    """The packed pass of one model. One thread at a time; the model must be frozen and in eval mode.

    Outside of a pass, and while `boundary` runs, the model is as it was. `boundary` may raise: the pass is given up and
    the model left as it was. On CUDA the boundaries of a backward pass are called by torch's own thread, while the
    thread that began it waits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        activation_checkpointing: bool = False,
        boundary: Callable[[], None] | None = None,
    ) -> None:
        """Run a few tokens to see which modules attend. Raises UnsupportedBackboneError."""
        if model.training:
            raise UnsupportedBackboneError("the backbone is in training mode; call its eval() first")
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise UnsupportedBackboneError("the backbone is not frozen; call its requires_grad_(False) first")
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._checkpointing = activation_checkpointing
        self._boundary = boundary
        self._context = PassContext()
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs: list[Any] = [config for config in configs.values() if hasattr(config, _IMPLEMENTATION)]
        self._stock: list[str | None] = []
        self._is_running = False
        self.boundary_error: BaseException | None = None
        """What `boundary` last raised: the caller's own, and no fault of the model."""
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        attending = self._discover()
        self.layers: tuple[LayerShape, ...] = tuple(shape for _, shape in attending)
        self._attending = [module for module, _ in attending]
        self._context.layer_of = {id(module): index for index, module in enumerate(self._attending)}
        self._blocks = _blocks(model, self._attending)
        self.hidden_size = int(embed(model, torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1])

    @contextmanager
    def logits(self, batch: PackedBatch, prompts: Sequence[PromptValues | None]) -> Iterator[torch.Tensor]:
        """The logits `[num_targets, vocab_size]` of the batch's targets, in the backbone's dtype.

        `prompts` are those that the batch was packed for, None for no prompt. A backward pass must run inside the
        block. Without gradients (`torch.no_grad`), nothing is kept.
        """
        embeds = self._embed(batch, prompts)
        used = {prompt for group in batch.groups for prompt, _ in group.prompt_runs if group.num_prefix}
        given = {prompt: prompts[prompt] for prompt in used}
        self._context.groups = batch.groups
        self._context.prefixes = {
            prompt: values
            for prompt, values in given.items()
            if values is not None and not isinstance(values, torch.Tensor)
        }
        with self._running():
            try:
                logits = self._call(embeds, batch.positions, batch.target_tokens)
                # The head is as long as many layers: it has its borders too.
                self._border(logits)
                yield logits
            finally:
                self._context.groups, self._context.prefixes = (), {}

    @torch.no_grad()
    def keys_values(self, batch: PackedBatch) -> list[KeysValues]:
        """Every layer's keys and values of a batch without given prefixes: `[kv_heads, T, dim]` each."""
        self._context.captured = []
        try:
            with self.logits(batch, ()):
                return self._context.captured
        finally:
            self._context.captured = None

    def at_boundary(self) -> None:
        """Call `boundary`, if there is one, with the model as it was before the pass."""
        if self._boundary is None:
            return
        was_running = self._is_running
        if was_running:
            self._give_back()
        try:
            self._boundary()
        except BaseException as error:
            self.boundary_error = error
            raise
        finally:
            if was_running:
                self._take()

    def _border(self, hidden: Any) -> None:
        """A boundary here, and one where the backward pass comes by."""
        self.at_boundary()
        if self._boundary is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self.at_boundary())

    def _embed(self, batch: PackedBatch, prompts: Sequence[PromptValues | None]) -> torch.Tensor:
        embeds = embed(self.model, batch.token_ids)
        vectors = [prompts[index] for index in batch.vector_prompts]
        parts = [part.to(embeds.dtype) for part in vectors if isinstance(part, torch.Tensor)]
        return torch.cat([*parts, embeds]) if parts else embeds

    def _call(self, embeds: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        kwargs: dict[str, Any] = {"logits_to_keep": wanted} if self._keeps_logits else {}
        output = self.model(
            inputs_embeds=embeds.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **kwargs
        )
        # By an index of flat rows: a slice that is not contiguous would make the head a batched product.
        logits: torch.Tensor = output.logits[0] if self._keeps_logits else output.logits[0][wanted]
        return logits

    @torch.no_grad()
    def _discover(self) -> list[tuple[torch.nn.Module, LayerShape]]:
        for module in self.model.modules():
            object.__setattr__(module, CONTEXT_ATTRIBUTE, self._context)
        self._context.probe = []
        self._take()
        try:
            ids = torch.zeros(3, dtype=torch.long, device=self.device)
            positions = torch.arange(3, device=self.device)
            self._call(embed(self.model, ids), positions, positions[-1:])
            found = self._context.probe
        except Exception as error:  # whatever a model does that was never meant to be run so
            reason = str(error) if isinstance(error, UnsupportedAttentionError) else f"{type(error).__name__}: {error}"
            raise UnsupportedBackboneError(
                f"no prompt can be trained over {self.model.config.model_type}: a packed pass fails ({reason})"
            ) from error
        finally:
            self._give_back()
            self._context.probe = None
            for module in self.model.modules():
                object.__delattr__(module, CONTEXT_ATTRIBUTE)
        if not found:
            raise UnsupportedBackboneError(
                f"{self.model.config.model_type} computes attention by itself, not through transformers' interface; no "
                "prompt can be trained over it"
            )
        if len({id(module) for module, _ in found}) != len(found):
            raise UnsupportedBackboneError("a module of the backbone attends more than once a pass")
        return found

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have the model's attention, its layers' borders and their checkpointing be ours."""
        if self._is_running:
            raise RuntimeError("a packed pass is running already")
        for module in self._attending:
            object.__setattr__(module, CONTEXT_ATTRIBUTE, self._context)
        for block in self._blocks:
            # On the instance, in front of the class's own.
            object.__setattr__(block, "forward", self._bordered(block.forward))
        self._take()
        try:
            yield
        finally:
            if self._is_running:
                self._give_back()
            for block in self._blocks:
                object.__delattr__(block, "forward")
            for module in self._attending:
                object.__delattr__(module, CONTEXT_ATTRIBUTE)

    def _bordered(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._is_running:
                return forward(*args, **kwargs)
            self._border(args[0] if args else kwargs["hidden_states"])
            if not (self._checkpointing and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            # Nothing in a frozen model in eval mode draws random numbers.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    def _take(self) -> None:
        self._stock = [getattr(config, _IMPLEMENTATION) for config in self._configs]
        for config in self._configs:
            setattr(config, _IMPLEMENTATION, ATTENTION_NAME)
        self._is_running = True

    def _give_back(self) -> None:
        self._is_running = False
        for config, name in zip(self._configs, self._stock, strict=True):
            setattr(config, _IMPLEMENTATION, name)


def _blocks(model: PreTrainedModel, attending: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The decoder layer around each attending module: the nearest entry of a list of modules that holds it."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks: dict[int, torch.nn.Module] = {}
    for module in attending:
        name = names[id(module)]
        while name:
            parent = name.rpartition(".")[0]
            if isinstance(model.get_submodule(parent), torch.nn.ModuleList):
                block = model.get_submodule(name)
                blocks[id(block)] = block
                break
            name = parent
    if not blocks:
        raise UnsupportedBackboneError("the backbone's layers cannot be told apart; no prompt can be trained over it")
    return list(blocks.values())
