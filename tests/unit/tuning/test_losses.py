"""Losses in chunks are those of torch, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from tuning import losses
from tuning.losses import cross_entropies, divergences


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 70)


@pytest.mark.parametrize("num_targets", [1, 6, 7, 15])
def test_cross_entropies_are_those_of_torch(num_targets: int) -> None:
    torch.manual_seed(num_targets)
    logits = torch.randn(num_targets, 11, requires_grad=True)
    reference = logits.detach().clone().requires_grad_()
    targets, weights = torch.randint(0, 11, (num_targets,)), torch.rand(num_targets)
    found, expected = cross_entropies(logits, targets), F.cross_entropy(reference, targets, reduction="none")
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


@pytest.mark.parametrize("num_targets", [1, 13])
def test_divergences_are_those_of_torch(num_targets: int) -> None:
    torch.manual_seed(num_targets)
    logits, teacher = torch.randn(num_targets, 11, requires_grad=True), torch.randn(num_targets, 11)
    reference = logits.detach().clone().requires_grad_()
    weights = torch.rand(num_targets)
    found = divergences(logits, teacher)
    parts = F.kl_div(reference.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(found, parts.sum(-1))
    (found * weights).sum().backward()
    (parts.sum(-1) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_half_precision_is_summed_in_single() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(9, 11) * 8).bfloat16().requires_grad_()
    found = cross_entropies(logits, torch.arange(9))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), torch.arange(9), reduction="none"))
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_a_target_that_is_not_finite_spoils_itself_alone() -> None:
    logits = torch.randn(12, 11)
    logits[4] = float("nan")
    logits.requires_grad_()
    found = cross_entropies(logits, torch.zeros(12, dtype=torch.long))
    found.sum().backward()
    assert logits.grad is not None
    assert torch.isnan(found).tolist() == torch.isnan(logits.grad).any(dim=1).tolist() == [i == 4 for i in range(12)]
