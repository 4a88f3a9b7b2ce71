"""The forms in which a frozen weight can be kept for products, and which of them is fastest on this machine.

Owns the layouts, the products over them and the measurement that chooses. Refuses to know which module of which model
a weight comes from (`server.engine.linear` does).

A form holds the weights of one or several projections of the same input ("siblings": a layer's q, k and v) and
multiplies them in one pass. Native: blocks of 32 outputs for AVX512-bf16, see kernels/native/linear.cpp; a row's
result does not depend, to the bit, on what shares the batch. oneDNN: its own blocked layout, as inductor's freezing
uses it. Plain: as torch keeps it. Int8 is symmetric with one scale an output (Dettmers et al. 2022, without outliers).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.kernels import native

WeightForm = Literal["native", "onednn", "plain"]
Quantization = Literal["none", "int8"]

_COLUMNS = 32
_TIMED_ROWS = (1, 16, 64)
_TIMED_ROUNDS = 9
_WORTH = 0.1
_TILE_ELEMENTS = 1 << 21
_MAX_INT8_ROWS = 4


class Projections(nn.Module, ABC):
    """Weights of siblings. `widths[i]` is the number of outputs of sibling i; biases are the siblings' own or None."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """`rows [..., K]` of the serving dtype. Returns one `[..., widths[i]]` a sibling, bias added."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The weights as torch keeps them, `[sum(widths), K]`: a copy, unless the form is plain."""

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The weights as `dense`, in parts that are made one by one: where each begins, and its rows `[n, K]`."""
        yield 0, self.dense()

    def weight(self, place: int) -> torch.Tensor:
        """One sibling's weight `[widths[place], K]`; int8 is multiplied out."""
        first = sum(self.widths[:place])
        return self.dense()[first : first + self.widths[place]]

    @property
    def num_bytes(self) -> int:
        return sum(_storage_bytes(buffer) for buffer in self.buffers())


class NativeProjections(Projections):
    """bf16 or int8 in blocks for `promptmux::linear`. Needs an even K."""

    packed: torch.Tensor  # [blocks, K / 2, 32, 2], bf16 or int8
    scale: torch.Tensor | None  # [blocks * 32], fp32
    bias: torch.Tensor | None  # [blocks * 32], fp32

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], quantization: Quantization
    ) -> None:
        super().__init__([len(weight) for weight in weights])
        scales: list[torch.Tensor] = []
        blocks = []
        for weight in weights:
            kept = weight
            if quantization == "int8":
                kept, scale = quantize(weight)
                scales.append(_pad(scale))
            padded = _pad(kept)
            blocks.append(padded.view(-1, _COLUMNS, padded.shape[1] // 2, 2).permute(0, 2, 1, 3))
        self.register_buffer("packed", torch.cat(blocks).contiguous(), persistent=False)
        self.register_buffer("scale", torch.cat(scales) if scales else None, persistent=False)
        bias = _joined_bias(biases, self.widths, torch.float32)
        if bias is not None:
            bias = torch.cat([_pad(part) for part in torch.split(bias, self.widths)])
        self.register_buffer("bias", bias, persistent=False)

    def multiply(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        answers: Sequence[torch.Tensor] = torch.ops.promptmux.linear(
            rows, self.packed, self.scale, self.bias, self.widths
        )
        return answers

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        if len(self.widths) > 1:
            yield from super().tiles()
            return
        step = max(1, _TILE_ELEMENTS // (2 * self.packed.shape[1] * _COLUMNS))
        for first in range(0, len(self.packed), step):
            start = first * _COLUMNS
            yield start, self._unpack(slice(first, first + step))[: self.widths[0] - start]

    def dense(self) -> torch.Tensor:
        padded = self._unpack(slice(None))
        padded_widths = [-(-width // _COLUMNS) * _COLUMNS for width in self.widths]
        return torch.cat(
            [part[:width] for part, width in zip(torch.split(padded, padded_widths), self.widths, strict=True)]
        )

    def _unpack(self, blocks: slice) -> torch.Tensor:
        """Whole blocks as `[num_blocks * 32, K]`, int8 multiplied out."""
        # Pairs are moved as one number: several times as fast as moving their halves.
        pairs = self.packed[blocks].view(torch.int16 if self.packed.dtype == torch.int8 else torch.int32).squeeze(-1)
        rows = pairs.transpose(1, 2).contiguous().view(self.packed.dtype).flatten(0, 1)
        if self.scale is None:
            return rows
        scale = self.scale[(blocks.start or 0) * _COLUMNS :][: len(rows)]
        return (rows * scale[:, None]).to(torch.bfloat16)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[..., K]` of the only sibling's weight, without unpacking the others. Not for int8."""
        return self.packed[ids // _COLUMNS, :, ids % _COLUMNS].flatten(-2)


class OnednnProjections(Projections):
    """The layout that oneDNN prefers, in the serving dtype (`_linear_pointwise`, as inductor's freezing calls it)."""

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        super().__init__([len(weight) for weight in weights])
        joined = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(joined), persistent=False)
        self.register_buffer("bias", _joined_bias(biases, self.widths, weights[0].dtype), persistent=False)

    def multiply(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        answers = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return _split(answers, self.widths)

    def dense(self) -> torch.Tensor:
        return self.packed.to_dense()


class PlainProjections(Projections):
    """Siblings in one matrix, as torch keeps it; any device."""

    joined: torch.Tensor  # [sum(widths), K]
    bias: torch.Tensor | None

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        super().__init__([len(weight) for weight in weights])
        self.register_buffer("joined", torch.cat(list(weights)), persistent=False)
        self.register_buffer("bias", _joined_bias(biases, self.widths, weights[0].dtype), persistent=False)

    def multiply(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return _split(F.linear(rows, self.joined, self.bias), self.widths)

    def dense(self) -> torch.Tensor:
        return self.joined


class PlainInt8Projections(Projections):
    """Int8 without the native kernel: torch's own product for a few rows, tiles that are multiplied out for more."""

    joined: torch.Tensor  # [sum(widths), K], int8
    scale: torch.Tensor  # [sum(widths)], serving dtype
    bias: torch.Tensor | None

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        super().__init__([len(weight) for weight in weights])
        quantized = [quantize(weight) for weight in weights]
        dtype = weights[0].dtype
        self.register_buffer("joined", torch.cat([kept for kept, _ in quantized]), persistent=False)
        self.register_buffer("scale", torch.cat([scale for _, scale in quantized]).to(dtype), persistent=False)
        self.register_buffer("bias", _joined_bias(biases, self.widths, dtype), persistent=False)

    def multiply(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        flat = rows.flatten(0, -2)
        if len(flat) <= _MAX_INT8_ROWS:
            answers = torch._weight_int8pack_mm(flat.contiguous(), self.joined, self.scale)
        else:
            step = max(1, _TILE_ELEMENTS // self.joined.shape[1])
            tiles = [F.linear(flat, tile.to(flat.dtype)) for tile in torch.split(self.joined, step)]
            answers = torch.cat(tiles, dim=-1) * self.scale
        if self.bias is not None:
            answers = answers + self.bias
        return _split(answers.view(*rows.shape[:-1], -1), self.widths)

    def dense(self) -> torch.Tensor:
        return self.joined.to(self.scale.dtype) * self.scale[:, None]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight [N, K]` as int8 `[N, K]` and fp32 scales `[N]`: weight ≈ int8 * scale, symmetric, -127 to 127."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def pack(
    form: WeightForm,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    quantization: Quantization,
) -> Projections:
    """Siblings' weights `[widths[i], K]` in one form. Where the form cannot hold this K, the plain one is taken."""
    if form == "native" and weights[0].shape[1] % 2 == 0:
        return NativeProjections(weights, biases, quantization)
    if quantization == "int8":
        return PlainInt8Projections(weights, biases)
    return OnednnProjections(weights, biases) if form == "onednn" else PlainProjections(weights, biases)


def usable_forms(dtype: torch.dtype, device: torch.device, quantization: Quantization) -> list[WeightForm]:
    """What this machine can multiply with, in the order of preference where nothing is measured."""
    forms: list[WeightForm] = ["plain"]
    if device.type != "cpu":
        return forms
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if quantization == "none" and has_onednn and dtype in (torch.float32, torch.bfloat16):
        forms.insert(0, "onednn")
    if dtype == torch.bfloat16 and native_is_usable():
        forms.insert(0, "native")
    return forms


def native_is_usable() -> bool:
    """Whether the native library is there and this CPU has the instructions. May compile it: tens of seconds, once."""
    try:
        native.load_native()
    except native.NativeUnavailableError:
        return False
    return bool(torch.ops.promptmux.linear_is_supported())


def fastest_form(
    forms: Sequence[WeightForm], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, quantization: Quantization
) -> WeightForm:
    """Time each form on random weights of `shapes (N, K)` for 1, 16 and 64 rows; takes about a second, on CPU.

    `forms` come in the order of preference: a later one must be faster by `_WORTH` of the time. Rounds are interleaved
    and the shortest counts, so that another program's burst does not decide.
    """
    if len(forms) == 1:
        return forms[0]
    totals = dict.fromkeys(forms, 0.0)
    for outputs, inputs in shapes:
        weight = torch.rand((outputs, inputs), dtype=torch.float32).sub_(0.5).to(dtype)
        packed = {form: pack(form, [weight], [None], quantization) for form in forms}
        for num_rows in _TIMED_ROWS:
            rows = torch.rand((num_rows, inputs), dtype=torch.float32).to(dtype)
            timed = _interleaved_minima({form: partial(kept.multiply, rows) for form, kept in packed.items()})
            for form, seconds in timed.items():
                totals[form] += seconds
    chosen = forms[0]
    for form in forms[1:]:
        if totals[form] < (1 - _WORTH) * totals[chosen]:
            chosen = form
    return chosen


def _interleaved_minima(calls: dict[WeightForm, Callable[[], object]]) -> dict[WeightForm, float]:
    times: dict[WeightForm, list[float]] = {form: [] for form in calls}
    for call in calls.values():
        call()
    for _ in range(_TIMED_ROUNDS):
        for form, call in calls.items():
            start = time.perf_counter()
            call()
            times[form].append(time.perf_counter() - start)
    return {form: min(seconds) for form, seconds in times.items()}


def _pad(rows: torch.Tensor) -> torch.Tensor:
    """Zeros up to a whole number of blocks along the first dimension."""
    missing = -len(rows) % _COLUMNS
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows


def _split(answers: torch.Tensor, widths: Sequence[int]) -> Sequence[torch.Tensor]:
    """The siblings' parts of the last dimension."""
    return torch.split(answers, list(widths), dim=-1)


def _joined_bias(
    biases: Sequence[torch.Tensor | None], widths: Sequence[int], dtype: torch.dtype
) -> torch.Tensor | None:
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    parts = [
        bias.detach().to(dtype) if bias is not None else given.new_zeros(width, dtype=dtype)
        for bias, width in zip(biases, widths, strict=True)
    ]
    return torch.cat(parts)


def _storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
