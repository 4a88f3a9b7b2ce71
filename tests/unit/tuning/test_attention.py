"""The ways to compute attention agree, forward and backward, and what is not known is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tuning import attention
from tuning.attention import UnsupportedAttentionError, packed_attention
from tuning.forward import PackedPass, by_layer
from tuning.losses import cross_entropies
from tuning.packing import pack

from .test_forward import ROWS, SLOTS, make_prompts, values_of
from .tiny import load_tiny


@pytest.fixture(params=["llama", "mistral"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> PackedPass:
    """With grouped queries; Mistral's window of 6 is shorter than the longest row."""
    return PackedPass(load_tiny(request.param, tmp_path))


def run(packed: PackedPass) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    leaves = make_prompts(packed)
    batch = pack(ROWS, SLOTS, packed.device)
    with packed.logits(batch, values_of(packed, leaves)) as logits:
        losses = cross_entropies(logits, batch.target_ids)
        losses.sum().backward()
    return losses.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("way", ["fused", "step by step"])
def test_all_ways_agree(packed: PackedPass, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    losses, gradients = run(packed)
    if way == "fused":
        monkeypatch.setattr(attention, "_MAX_SCORES", 0)
        monkeypatch.delattr(attention, "_products")
    else:
        monkeypatch.setattr(attention, "_attend", attention._attend_unusually)
    found, found_gradients = run(packed)
    torch.testing.assert_close(found, losses, atol=1e-4, rtol=1e-5)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_of_products_are_right_to_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 6, 4), (2, 5, 4), (2, 5, 3))
    )
    visible = torch.ones(3, 5, dtype=torch.bool).tril(2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible.repeat(2, 1), scale=0.7)
    found = attention._products(query, key, value, visible, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    found_gradients, expected_gradients = (
        torch.autograd.grad((answer * weights).sum(), (query, key, value)) for answer in (found, expected)
    )
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_longest_rows_go_through_the_fused_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = attention.F.scaled_dot_product_attention

    def count(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", count)
    monkeypatch.setattr(attention, "_MAX_SCORES", 4 * 22 * 24 - 1)
    run(PackedPass(load_tiny("llama", tmp_path)))
    assert {*calls} == {22}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(1)}, "builds an attention mask"),
        ({"attention_mask": None, "dropout": 0.1}, "not in eval mode"),
        ({"attention_mask": None, "alibi": 1, "bias": 2}, "passes alibi, bias to its attention"),
    ],
)
def test_what_would_be_left_out_is_refused(arguments: dict[str, Any], message: str) -> None:
    module = torch.nn.Module()
    object.__setattr__(module, attention.CONTEXT_ATTRIBUTE, attention.PassContext())
    heads = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UnsupportedAttentionError, match=message):
        packed_attention(module, heads, heads, heads, **arguments)


def test_given_keys_and_values_are_cast_once_and_their_gradients_are_single() -> None:
    leaf = torch.randn(2, 2, 1, 3, 4, requires_grad=True)
    layers = by_layer(leaf, torch.bfloat16)
    sum(part.float().sum() for pair in layers for part in pair).backward()  # type: ignore[union-attr]
    assert {part.dtype for pair in layers for part in pair} == {torch.bfloat16}
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
