"""A packed pass computes what the stock model computes, row by row, and leaves the model as it was."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from tuning import attention
from tuning.forward import PackedPass, PromptValues, by_layer, embed
from tuning.losses import cross_entropies
from tuning.packing import PromptSlot, Row, pack

from .tiny import FAMILIES, load_tiny

K = 4
ROWS = [
    Row(0, (9, 8, 7, 6, 5, 11, 12, 13, 14), (3, 4)),
    Row(1, (20, 21, 22), (5,)),
    Row(0, (30, 31, 32, 33, 34), (6, 7, 8)),
    Row(2, tuple(range(40, 62)), (9, 10)),
    Row(1, (70,), (11,)),
    Row(3, (80, 81, 82, 83), (12,)),
]
SLOTS = [PromptSlot(K, True), PromptSlot(K, False), PromptSlot(2, True), PromptSlot(0, False)]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return load_tiny(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> PreTrainedModel:
    return load_tiny("llama", tmp_path)


def make_prompts(packed: PackedPass) -> list[torch.Tensor]:
    """Leaves: two prompts of vectors, and one of keys and values between them."""
    layer = packed.layers[0]
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (K, packed.hidden_size),
        (len(packed.layers), 2, layer.kv_heads, K, layer.key_dim),
        (2, packed.hidden_size),
    ]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def values_of(packed: PackedPass, leaves: Sequence[torch.Tensor]) -> list[PromptValues | None]:
    return [leaves[0], by_layer(leaves[1], packed.dtype), leaves[2], None]


def packed_losses(
    packed: PackedPass, rows: Sequence[Row], leaves: Sequence[torch.Tensor], *, backward: bool = False
) -> list[torch.Tensor]:
    batch = pack(rows, SLOTS, packed.device)
    with packed.logits(batch, values_of(packed, leaves)) as logits:
        losses = cross_entropies(logits, batch.target_ids)
        if backward:
            losses.sum().backward()
    return [losses[batch.target_rows == row].detach() for row in range(len(rows))]


def loss_alone(model: PreTrainedModel, row: Row, prompt: torch.Tensor | None) -> torch.Tensor:
    """The stock model's losses of one row's targets."""
    stock: Any = model
    embeds = embed(model, torch.tensor(row.token_ids)).unsqueeze(0)
    kwargs: dict[str, Any] = {"use_cache": False}
    if prompt is not None and prompt.dim() == 2:
        embeds = torch.cat([prompt.unsqueeze(0), embeds], dim=1)
    elif prompt is not None:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(by_layer(prompt, model.dtype)):
            cache.update(keys.unsqueeze(0), values.unsqueeze(0), index)
        mask = torch.ones((1, prompt.shape[3] + embeds.shape[1]), dtype=torch.long)
        kwargs = {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
    logits = stock(inputs_embeds=embeds, **kwargs).logits[0, -len(row.target_ids) :]
    return F.cross_entropy(logits, torch.tensor(row.target_ids), reduction="none")


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_rows_alone(model: PreTrainedModel, activation_checkpointing: bool) -> None:
    packed = PackedPass(model, activation_checkpointing=activation_checkpointing)
    leaves = make_prompts(packed)
    found = packed_losses(packed, ROWS, leaves, backward=True)
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    model.set_attn_implementation("eager")
    for row, losses in zip(ROWS, found, strict=True):
        expected = loss_alone(model, row, leaves[row.prompt] if row.prompt < 3 else None)
        torch.testing.assert_close(losses, expected.detach(), atol=2e-4, rtol=1e-4)
        if expected.requires_grad:
            expected.sum().backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, atol=5e-4, rtol=1e-3)


def test_gradients_do_not_depend_on_how_rows_are_cut_into_passes(llama: PreTrainedModel) -> None:
    packed = PackedPass(llama)
    leaves = make_prompts(packed)
    packed_losses(packed, ROWS, leaves, backward=True)
    whole = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    for row in ROWS:
        if row.prompt < 3:
            packed_losses(packed, [row], leaves, backward=True)
    for leaf, gradient in zip(leaves, whole, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_prompt_that_is_not_finite_spoils_its_own_rows_alone(llama: PreTrainedModel) -> None:
    packed = PackedPass(llama)
    leaves = make_prompts(packed)
    clean = packed_losses(packed, ROWS, leaves, backward=True)
    gradients = [leaf.grad for leaf in leaves]
    for spoilt in range(3):
        broken = [leaf.detach().clone() for leaf in leaves]
        broken[spoilt].view(-1)[0] = float("nan")
        broken = [leaf.requires_grad_() for leaf in broken]
        found = packed_losses(packed, ROWS, broken, backward=True)
        for row, before, after in zip(ROWS, clean, found, strict=True):
            assert torch.isnan(after).all() if row.prompt == spoilt else torch.equal(before, after)
        for prompt, (before, leaf) in enumerate(zip(gradients, broken, strict=True)):
            assert leaf.grad is not None
            assert torch.isnan(leaf.grad).any() if prompt == spoilt else torch.equal(leaf.grad, before)


def test_frozen_weights_get_no_gradient(llama: PreTrainedModel) -> None:
    packed = PackedPass(llama)
    packed_losses(packed, ROWS, make_prompts(packed), backward=True)
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_checkpointing_keeps_few_activations(llama: PreTrainedModel, activation_checkpointing: bool) -> None:
    packed = PackedPass(llama, activation_checkpointing=activation_checkpointing)
    batch, leaves = pack(ROWS, SLOTS, packed.device), make_prompts(packed)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        packed.logits(batch, values_of(packed, leaves)),
    ):
        pass
    per_token = sum(kept.values()) / batch.num_tokens
    assert per_token < 2500 if activation_checkpointing else per_token > 5000


class Watcher:
    """A boundary that uses the model in its stock way, and counts."""

    def __init__(self, model: PreTrainedModel, stop_after: int | None = None) -> None:
        self.model, self.stop_after, self.num_calls = model, stop_after, 0
        self.expected = self.answer()

    def answer(self) -> torch.Tensor:
        stock: Any = self.model
        with torch.inference_mode():
            return stock(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits

    def __call__(self) -> None:
        self.num_calls += 1
        assert torch.equal(self.answer(), self.expected)
        if self.num_calls == self.stop_after:
            raise InterruptedError


def state_of(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """All that a pass might leave behind, module by module."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ] + [(model.config._attn_implementation,)]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_boundaries_lie_between_layers_both_ways_and_may_use_the_model(
    llama: PreTrainedModel, activation_checkpointing: bool
) -> None:
    undisturbed = PackedPass(llama)
    leaves = make_prompts(undisturbed)
    expected = packed_losses(undisturbed, ROWS, leaves, backward=True)
    gradients = [leaf.grad for leaf in leaves]
    watcher = Watcher(llama)
    packed = PackedPass(llama, activation_checkpointing=activation_checkpointing, boundary=watcher)
    again = make_prompts(packed)
    found = packed_losses(packed, ROWS, again, backward=True)
    num_layers = len(packed.layers)
    # And around the head, which is as long as many layers.
    assert watcher.num_calls == 2 * (num_layers + 1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for leaf, gradient in zip(again, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=0 if not activation_checkpointing else 1e-6, rtol=0)


@pytest.mark.parametrize("stop_after", [1, 3, 5])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_boundary_that_raises_gives_up_the_pass_and_leaves_the_model_as_it_was(
    llama: PreTrainedModel, stop_after: int, activation_checkpointing: bool
) -> None:
    before = state_of(llama)
    packed = PackedPass(
        llama, activation_checkpointing=activation_checkpointing, boundary=Watcher(llama, stop_after=stop_after)
    )
    assert state_of(llama) == before
    leaves = make_prompts(packed)
    with pytest.raises(InterruptedError):
        packed_losses(packed, ROWS, leaves, backward=True)
    assert state_of(llama) == before
    # The next pass is as good as any.
    packed_losses(packed, ROWS, leaves)


def test_a_pass_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = state_of(model)
    packed = PackedPass(model)
    packed_losses(packed, ROWS, make_prompts(packed), backward=True)
    assert state_of(model) == before


def test_keys_and_values_of_a_text_are_those_of_the_models_cache(llama: PreTrainedModel) -> None:
    packed = PackedPass(llama)
    ids = (5, 9, 6, 7)
    found = packed.keys_values(pack([Row(0, ids, (0,))], [PromptSlot(0, in_pass=False)], packed.device))
    stock: Any = llama
    cache = stock(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    for (keys, values), layer in zip(found, cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0])
        torch.testing.assert_close(values, layer.values[0])


@pytest.mark.parametrize(
    "mutate",
    [
        lambda runs: tuple((1 - prompt, count) for prompt, count in runs),
        lambda runs: runs[::-1],
    ],
)
def test_rows_given_each_others_prompts_would_be_noticed(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[tuple[tuple[int, int], ...]], tuple[tuple[int, int], ...]],
) -> None:
    packed = PackedPass(llama)
    leaves = make_prompts(packed)
    rows = [row for row in ROWS if row.prompt < 2]
    right = packed_losses(packed, rows, leaves)
    original = attention._attend_groups

    def swapped(queries: Any, keys: Any, values: Any, groups: Any, given: Any, layer: Any) -> torch.Tensor:
        for group in groups:
            group.prompt_runs = mutate(group.prompt_runs)
        return original(queries, keys, values, groups, given, layer)

    monkeypatch.setattr(attention, "_attend_groups", swapped)
    wrong = packed_losses(packed, rows, leaves)
    assert any(not torch.allclose(one, other, atol=1e-2) for one, other in zip(right, wrong, strict=True))
