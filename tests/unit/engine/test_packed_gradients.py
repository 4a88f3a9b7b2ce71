"""The gradient of a packed product is that of the product that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from server.engine import packed_weights
from server.engine.linear import PackedLinear, _Siblings
from server.engine.packed_gradients import multiply_with_gradient
from server.engine.packed_weights import Quantization, WeightForm, pack, usable_forms

CPU = torch.device("cpu")
WIDTHS = (48, 33, 16)
KINDS: list[tuple[WeightForm, torch.dtype, Quantization]] = [
    ("plain", torch.float32, "none"),
    ("onednn", torch.float32, "none"),
    ("onednn", torch.bfloat16, "none"),
    ("native", torch.bfloat16, "none"),
    ("plain", torch.float32, "int8"),
    ("native", torch.bfloat16, "int8"),
]


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize(("form", "dtype", "quantization"), KINDS)
def test_gradient_is_that_of_the_dense_product(
    form: WeightForm, dtype: torch.dtype, quantization: Quantization, used: tuple[int, ...]
) -> None:
    if form not in usable_forms(dtype, CPU, quantization):
        pytest.skip(f"this machine has no {form} form for {dtype}, {quantization}")
    weights = [random(width, 64, seed=place, dtype=dtype) for place, width in enumerate(WIDTHS)]
    biases = [random(width, seed=9, dtype=dtype) for width in WIDTHS]
    projections = pack(form, weights, biases, quantization)
    dense = [projections.weight(place).to(dtype) for place in range(len(WIDTHS))]
    rows = random(1, 7, 64, seed=5, dtype=dtype).requires_grad_()
    expected_rows = rows.detach().clone().requires_grad_()

    answers = multiply_with_gradient(projections, rows)
    torch.autograd.backward(sum((answers[place].float().square().sum() for place in used), torch.zeros(())))
    expected = [F.linear(expected_rows, dense[place], biases[place]) for place in used]
    torch.autograd.backward(sum((answer.float().square().sum() for answer in expected), torch.zeros(())))

    assert rows.grad is not None
    assert expected_rows.grad is not None
    tolerance = 1e-4 if dtype is torch.float32 and quantization == "none" else 0.03
    for place, answer in zip(used, expected, strict=True):
        difference = (answers[place] - answer).detach().float().abs().max() / answer.detach().float().abs().max()
        assert float(difference) < tolerance
    difference = (rows.grad - expected_rows.grad).float().abs().max() / expected_rows.grad.float().abs().max()
    assert float(difference) < tolerance


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_head_that_is_unpacked_part_by_part_has_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> None:
    if "native" not in usable_forms(torch.bfloat16, CPU, quantization):
        pytest.skip("this machine has no native form")
    projections = pack("native", [random(301, 64, seed=0, dtype=torch.bfloat16)], [None], quantization)
    whole = projections.dense()
    monkeypatch.setattr(packed_weights, "_TILE_ELEMENTS", 64 * 96)
    tiles = list(projections.tiles())
    rows = random(5, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
    slopes = random(5, 301, seed=2, dtype=torch.bfloat16)

    torch.autograd.backward((multiply_with_gradient(projections, rows)[0] * slopes).sum())

    assert [start for start, _ in tiles] == [0, 96, 192, 288]
    assert torch.equal(torch.cat([tile for _, tile in tiles]), whole)
    assert rows.grad is not None
    expected = slopes.float() @ whole.float()
    assert float((rows.grad.float() - expected).abs().max() / expected.abs().max()) < 0.01


def test_weights_never_want_a_gradient() -> None:
    projections = pack("plain", [random(8, 6, seed=0, dtype=torch.float32)], [None], "none")
    rows = random(2, 6, seed=1, dtype=torch.float32).requires_grad_()

    torch.autograd.backward(multiply_with_gradient(projections, rows)[0].sum())

    assert not any(buffer.requires_grad for buffer in projections.buffers())


def test_another_pass_between_two_siblings_changes_neither() -> None:
    """What serving does at a boundary, were a boundary ever within a layer."""
    weights = [random(width, 64, seed=place, dtype=torch.float32) for place, width in enumerate(WIDTHS)]
    siblings = _Siblings(pack("onednn", weights, [None] * 3, "none"))
    layers = [PackedLinear(siblings, place, 64, None) for place in range(3)]
    rows = random(1, 7, 64, seed=5, dtype=torch.float32).requires_grad_()
    served = random(1, 3, 64, seed=6, dtype=torch.float32)

    first = layers[0](rows)
    with torch.inference_mode():
        for place, layer in enumerate(layers):
            torch.testing.assert_close(layer(served), F.linear(served, weights[place]))
    rest = [layer(rows) for layer in layers[1:]]
    torch.autograd.backward(torch.cat([first, *rest], dim=-1).sum())

    for place, answer in enumerate([first, *rest]):
        torch.testing.assert_close(answer, F.linear(rows.detach(), weights[place]))
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.ones(1, 7, sum(WIDTHS)) @ torch.cat(weights))
