"""The gate at load: what is sound passes, and each way of being wrong is turned away with its own reason."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, CONTEXT_ATTRIBUTE, StepContext, attach_context, packed_attention
from server.engine.forward import DenseForward, Forward, PackedForward
from server.engine.gate import TOLERANCE, GateResult, check_forward, gate_references, gate_rows
from server.engine.kernels.gather import gather_attention
from server.engine.kv import KvPool
from server.engine.pages import PAGE_SIZE
from server.engine.plan import StepPlan
from tests.factories import VOCAB_SIZE, load_model

Sabotage = Callable[..., tuple[torch.Tensor, None]]


def context_of(module: torch.nn.Module) -> StepContext:
    context: StepContext = getattr(module, CONTEXT_ATTRIBUTE)
    return context


def layer_index(module: torch.nn.Module) -> int:
    return context_of(module).layer_of[id(module)]


def wrong_scale(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return packed_attention(module, query * 1.1, *args, **kwargs)


def skipped_layer(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    answers, _ = packed_attention(module, *args, **kwargs)
    return (torch.zeros_like(answers) if layer_index(module) == 1 else answers), None


def neighbours_leak(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    answers, _ = packed_attention(module, *args, **kwargs)
    return answers + 0.1 * answers.mean(dim=1, keepdim=True), None


def little_leak(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Less than rounding is allowed to be: only a change of the neighbour shows it."""
    answers, _ = packed_attention(module, *args, **kwargs)
    return answers + 3e-4 * answers.mean(dim=1, keepdim=True), None


def keys_swapped(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return packed_attention(module, query, key.roll(1, dims=2), *args, **kwargs)


def history_forgotten(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """What was computed in earlier steps is lost, in every layer."""
    context = context_of(module)
    if context.batch is not None and context.pool is not None:
        keys, batch = context.pool.key_pages[layer_index(module)], context.batch
        counts = batch.query_starts.diff()
        for row, past in enumerate((batch.lengths - counts).tolist()):
            for column in range(past):
                keys[int(batch.page_table[row, column // PAGE_SIZE]), :, column % PAGE_SIZE] = 0.0
    return packed_attention(module, query, *args, **kwargs)


def second_page_missed(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Every row's second page is read from its first."""
    context = context_of(module)
    if context.batch is not None and context.batch.page_table.shape[1] > 1:
        table = context.batch.page_table.clone()
        table[:, 1] = table[:, 0]
        context.batch = replace(context.batch, page_table=table)
    return packed_attention(module, *args, **kwargs)


def future_seen(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Each token sees one column too many where its row has one."""
    answers, _ = packed_attention(module, query, *args, **kwargs)
    context = context_of(module)
    if context.batch is not None:
        ends = context.batch.query_starts[1:] - 1
        later = packed_attention(module, query.roll(1, dims=2), *args, **kwargs)[0].roll(-1, dims=1)
        later[:, ends.long()] = answers[:, ends.long()]
        answers = later
    return answers, None


def not_a_number(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    answers, _ = packed_attention(module, *args, **kwargs)
    answers[0, -1] = float("nan")
    return answers, None


def crash(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    if context_of(module).batch is not None:
        raise ValueError("out of paper")
    return packed_attention(module, *args, **kwargs)


@pytest.fixture
def sabotage() -> Iterator[Callable[[Sabotage], None]]:
    """Put another function in the place of the packed attention, until the test ends."""
    yield lambda function: AttentionInterface.register(ATTENTION_NAME, function)
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def make_packed(model: PreTrainedModel) -> PackedForward:
    context = StepContext(gather_attention)
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    return PackedForward(model, context)


def run_gate(folder: Path, make: Callable[[PreTrainedModel], Forward] = make_packed) -> GateResult:
    rows = gate_rows(VOCAB_SIZE)
    references = gate_references(load_model(folder), rows)
    return check_forward(make(load_model(folder)), references, rows, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "mixtral"])
def test_sound_packed_model_passes(tiny_backbone_folder: Callable[[str], Path], family: str) -> None:
    result = run_gate(tiny_backbone_folder(family))

    assert result.passed, result.reason
    assert result.error < 1e-5


@pytest.mark.parametrize("family", ["gptj", "bloom", "llama"])
def test_sound_dense_model_passes(tiny_backbone_folder: Callable[[str], Path], family: str) -> None:
    result = run_gate(tiny_backbone_folder(family), DenseForward)

    assert result.passed, result.reason
    assert result.error < 1e-5


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong_scale, "packed rows differ from rows alone"),
        (skipped_layer, "packed rows differ from rows alone"),
        (neighbours_leak, "packed rows differ from rows alone"),
        (keys_swapped, "packed rows differ from rows alone"),
        (future_seen, "packed rows differ from rows alone"),
        (not_a_number, "packed rows differ from rows alone by inf"),
        (second_page_missed, "packed rows differ from rows alone"),
        (history_forgotten, "a row in chunks differs from the whole"),
        (little_leak, "when its neighbour changes"),
        (crash, "ValueError: out of paper"),
    ],
)
def test_sabotaged_attention_is_turned_away(
    tiny_backbone_folder: Callable[[str], Path],
    sabotage: Callable[[Sabotage], None],
    function: Sabotage,
    reason: str,
) -> None:
    sabotage(function)
    result = run_gate(tiny_backbone_folder("llama"))

    assert not result.passed
    assert result.reason is not None
    assert reason in result.reason
    if function is not little_leak:
        assert result.error > TOLERANCE[torch.float32]


class WrongPage:
    """A dense pass that writes what it computed to the neighbour's page."""

    def __init__(self, forward: Forward) -> None:
        self.layers = forward.layers
        self._forward = forward

    def run(self, pool: KvPool, plan: StepPlan) -> torch.Tensor:
        logits = self._forward.run(pool, plan)
        for tensor in (*pool.key_pages, *pool.value_pages):
            tensor[:] = tensor.flip(0)
        return logits


def test_pass_that_writes_to_the_wrong_page_is_turned_away(tiny_backbone_folder: Callable[[str], Path]) -> None:
    result = run_gate(tiny_backbone_folder("gptj"), lambda model: WrongPage(DenseForward(model)))

    assert result.reason is not None
    assert "a row in chunks differs from the whole" in result.reason


def test_other_weights_than_the_references_are_turned_away(tiny_backbone_folder: Callable[[str], Path]) -> None:
    def make(model: PreTrainedModel) -> Forward:
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0] += 0.5
        return make_packed(model)

    assert not run_gate(tiny_backbone_folder("llama"), make).passed


def test_rows_are_ragged_and_their_third_is_other_content_of_the_second() -> None:
    short, long, other = gate_rows(7)

    assert len(short) < len(long) == len(other)
    assert long != other
    assert all(0 <= token_id < 7 for row in (short, long, other) for token_id in row)
    assert gate_rows(7) == [short, long, other]
