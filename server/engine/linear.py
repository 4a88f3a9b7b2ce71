"""Makes a loaded, frozen model multiply faster without changing what it computes.

Owns the swap of a model's linear layers for ones whose weights are packed once (`server.engine.packed_weights`), the
fusion of projections that are given the same input (q, k and v; gate and up), and the int8 option. Refuses to know
any architecture: siblings are found by watching one forward pass, and the swapped model is compared with the original
before it is handed on. A swapped layer still answers alone, in any order: fusion is only ever a matter of speed.

One thread at a time may run a swapped model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Conv1D, PreTrainedModel

from server.engine.gate import TOLERANCE, relative_difference
from server.engine.packed_gradients import multiply_with_gradient
from server.engine.packed_weights import (
    NativeProjections,
    Projections,
    Quantization,
    WeightForm,
    fastest_form,
    pack,
    usable_forms,
)

logger = logging.getLogger(__name__)

_INT8_TOLERANCE = 0.5
_PROBES = (1, 6, 30)
"""Lengths of the texts that are compared: products of one row, of a few and of many are computed in different ways."""
_GROUPING_PROBE = 6
_MIN_MEASURED_ELEMENTS = 1 << 20
_MAX_MEASURED_SHAPES = 4


class LinearError(RuntimeError):
    """The model's linear layers cannot be prepared as asked; the message says why. It may be half changed."""


class ProbeError(RuntimeError):
    """The model as it was loaded cannot be run; the message says why."""


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was done. `error` is the largest difference of logits, before against after (`gate.relative_difference`)."""

    form: WeightForm
    quantization: Quantization
    num_packed: int
    num_fused: int
    num_bytes: int
    error: float


class PackedLinear(nn.Module):
    """Stands where a linear layer stood. Its weights are in a `Projections` that it may share with siblings."""

    siblings: "_Siblings"

    def __init__(self, siblings: "_Siblings", place: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias  # for model code that looks at it: the product has its own
        if place == 0:
            # One owner: a module that is found under several names would be exported several times.
            self.projections = siblings.projections
        object.__setattr__(self, "siblings", siblings)
        self.place = place
        self.in_features = in_features
        self.out_features = siblings.projections.widths[place]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows [..., in_features]`; returns `[..., out_features]`."""
        return self.siblings.answer(self.place, rows)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy `[out_features, in_features]`, for model code that looks at it; slow."""
        return self.siblings.projections.weight(self.place)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedEmbedding(nn.Module):
    """The input embeddings of a model whose head shares their table: rows are read out of the head's packed weight."""

    head: NativeProjections

    def __init__(self, head: NativeProjections) -> None:
        super().__init__()
        object.__setattr__(self, "head", head)
        self.num_embeddings, self.embedding_dim = head.widths[0], 2 * head.packed.shape[1]

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids [...]`; returns `[..., embedding_dim]`."""
        return self.head.rows(token_ids)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy `[num_embeddings, embedding_dim]`; slow."""
        return self.head.weight(0)


@dataclass(slots=True, eq=False)
class _Siblings:
    """Projections of one input. The first that is asked computes all; each of the others takes its answer, once."""

    projections: Projections
    rows: torch.Tensor | None = None
    answers: dict[int, torch.Tensor] = field(default_factory=dict)

    def answer(self, place: int, rows: torch.Tensor) -> torch.Tensor:
        if self.rows is rows and place in self.answers:
            answer = self.answers.pop(place)
            if not self.answers:
                self.rows = None
            return answer
        if rows.requires_grad and torch.is_grad_enabled():
            computed = multiply_with_gradient(self.projections, rows)
        else:
            computed = self.projections.multiply(rows)
        self.answers = {other: answer for other, answer in enumerate(computed) if other != place}
        self.rows = rows if self.answers else None
        return computed[place]

    def forget(self) -> None:
        self.rows = None
        self.answers = {}


@dataclass(frozen=True, slots=True)
class _Found:
    """A linear layer of the model: where it hangs, and its weight as `[out_features, in_features]`."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias.detach() if bias is not None else None


def prepare_linears(
    model: PreTrainedModel, *, quantization: Quantization = "none", form: WeightForm | None = None
) -> LinearReport:
    """Swap the linear layers of a frozen model, in place. Blocking: about a second, and compiling where it is needed.

    `form` None measures the forms that this machine has on the model's own shapes. The weights' memory is given back
    layer by layer. A head tied to the input embeddings shares one packed table with them (native bf16), or the
    embeddings keep their own. "int8" is for the CPU. Raises LinearError; ProbeError when the model itself fails.
    """
    if quantization == "int8" and model.device.type != "cpu":
        raise LinearError("quantization int8 is for backbones on the CPU")
    # Not inference mode: siblings are told by their input's version counter, which inference tensors do not have.
    with torch.inference_mode(False), torch.no_grad():
        try:
            before = [_probe(model, length) for length in _PROBES]
        except Exception as error:
            raise ProbeError(f"{type(error).__name__}: {error}") from error
        try:
            report = _prepare(model, quantization, form, before)
        except LinearError:
            raise
        except Exception as error:
            raise LinearError(f"weights cannot be packed: {type(error).__name__}: {error}") from error
    logger.info("linear layers: %s", report)
    return report


def _prepare(
    model: PreTrainedModel, quantization: Quantization, form: WeightForm | None, before: Sequence[torch.Tensor]
) -> LinearReport:
    groups = _group(model, _linears(model))
    chosen = form or _choose_form(model, groups, quantization)
    embedding = _tied_embedding(model)
    num_packed = num_fused = num_bytes = 0
    handles: list[_Siblings] = []
    for group in groups:
        if chosen == "plain" and quantization == "none" and len(group) == 1:
            continue
        siblings = _swap(model, group, chosen, quantization)
        if embedding is not None and embedding[1] is group[0].module:
            _tie(model, embedding[0], siblings.projections, quantization)
        handles.append(siblings)
        num_packed += len(group)
        num_fused += len(group) if len(group) > 1 else 0
        num_bytes += siblings.projections.num_bytes
    _forget_at_each_pass(model, handles)
    error = max(
        relative_difference(_probe(model, length), expected) for length, expected in zip(_PROBES, before, strict=True)
    )
    allowed = _INT8_TOLERANCE if quantization == "int8" else TOLERANCE[model.dtype]
    if error > allowed:
        raise LinearError(f"packed ({chosen}, {quantization}) logits differ by {error:.1e} (allowed {allowed:.0e})")
    return LinearReport(chosen, quantization, num_packed, num_fused, num_bytes, error)


def _linears(model: PreTrainedModel) -> dict[nn.Module, _Found]:
    """Layers that may be swapped: exactly a linear, with a floating weight of its own and no hooks."""
    found: dict[nn.Module, _Found] = {}
    users: dict[int, int] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            users[id(module.weight)] = users.get(id(module.weight), 0) + 1
            if module.weight.dtype == model.dtype and not module._forward_hooks and not module._forward_pre_hooks:
                found[module] = _Found(name, module)
    return {module: linear for module, linear in found.items() if users[id(module.weight)] == 1}


def _group(model: PreTrainedModel, linears: dict[nn.Module, _Found]) -> list[list[_Found]]:
    """Siblings together, others alone, in the order of calls.

    Siblings are called one after another, once each a pass, with the very same tensor, unchanged between the calls.
    """
    calls: list[tuple[nn.Module, torch.Tensor, int]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0], args[0]._version)))
        for module in linears
    ]
    try:
        _probe(model, _GROUPING_PROBE)
    finally:
        for hook in hooks:
            hook.remove()
    num_calls: dict[nn.Module, int] = {}
    for module, _, _ in calls:
        num_calls[module] = num_calls.get(module, 0) + 1
    groups: list[list[_Found]] = []
    previous: tuple[torch.Tensor, int] | None = None
    seen: set[nn.Module] = set()
    for module, rows, version in calls:
        if module in seen:
            previous = None
            continue
        seen.add(module)
        together = previous is not None and previous[0] is rows and previous[1] == version
        if together and num_calls[module] == 1:
            groups[-1].append(linears[module])
        else:
            groups.append([linears[module]])
        previous = (rows, version) if num_calls[module] == 1 else None
    groups.extend([linear] for module, linear in linears.items() if module not in seen)
    return groups


def _choose_form(model: PreTrainedModel, groups: Sequence[Sequence[_Found]], quantization: Quantization) -> WeightForm:
    forms = usable_forms(model.dtype, model.device, quantization)
    elements: dict[tuple[int, int], int] = {}
    for group in groups:
        shape = (sum(len(linear.weight) for linear in group), group[0].weight.shape[1])
        elements[shape] = elements.get(shape, 0) + shape[0] * shape[1]
    if sum(elements.values()) < _MIN_MEASURED_ELEMENTS:
        return forms[0]
    heaviest = sorted(elements, key=lambda shape: elements[shape], reverse=True)[:_MAX_MEASURED_SHAPES]
    return fastest_form(forms, heaviest, model.dtype, quantization)


def _swap(model: nn.Module, group: Sequence[_Found], form: WeightForm, quantization: Quantization) -> _Siblings:
    in_features = group[0].weight.shape[1]
    packed = pack(form, [linear.weight for linear in group], [linear.bias for linear in group], quantization)
    siblings = _Siblings(packed)
    for place, linear in enumerate(group):
        _replace(model, linear.name, PackedLinear(siblings, place, in_features, linear.bias))
        # The name `linear.module` keeps the old layer alive until the caller's list goes; its memory goes now.
        linear.module.register_parameter("weight", None)
    return siblings


def _tied_embedding(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """The input embeddings' name and the head, when both are of the plain kinds and share one table."""
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(table) is not nn.Embedding or type(head) is not nn.Linear or table.weight is not head.weight:
        return None
    if table.max_norm is not None:
        return None
    return next(name for name, module in model.named_modules() if module is table), head


def _tie(model: nn.Module, name: str, head: Projections, quantization: Quantization) -> None:
    if isinstance(head, NativeProjections) and quantization == "none":
        _replace(model, name, PackedEmbedding(head))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    module.train(False)
    setattr(model.get_submodule(parent), attribute, module)


def _forget_at_each_pass(model: PreTrainedModel, handles: Sequence[_Siblings]) -> None:
    """A pass that was cut short by an error leaves answers behind; the next one must not find them."""
    shared = [siblings for siblings in handles if len(siblings.projections.widths) > 1]

    def forget(module: nn.Module, args: tuple[object, ...]) -> None:
        for siblings in shared:
            if siblings.answers:
                siblings.forget()

    model.register_forward_pre_hook(forget)


def _probe(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Logits of fixed tokens, `[length, vocab_size]` in fp32, by the attention that the model is set to."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, vocab_size, (1, length), generator=generator).to(model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float()
