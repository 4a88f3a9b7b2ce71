"""`promptmux::attend`: the same kernel, whose pool and step are found by a number that a traced graph can hold."""

from collections.abc import Iterator

import pytest
import torch

from server.engine.kernels.native import NativeUnavailableError, load_native, native_attention
from tests.unit.engine.kernels.batches import AttentionCase, HeadShape, RowSize, make_case

HANDLE = 7001
SHAPE = HeadShape(heads=4, kv_heads=2, key_dim=32, value_dim=16)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        load_native()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def case() -> AttentionCase:
    return make_case(SHAPE, [RowSize(1, 40), RowSize(1, 9), RowSize(5, 30)], sliding_window=20, with_sinks=True)


@pytest.fixture
def pools(case: AttentionCase) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """A pool of two layers, bound to HANDLE with the case's step."""
    keys = [case.key_pages.clone(), case.key_pages.flip(1).clone()]
    values = [case.value_pages.clone(), case.value_pages.flip(1).clone()]
    torch.ops.promptmux.bind_pool(HANDLE, keys, values)
    set_step(case)
    yield keys, values
    torch.ops.promptmux.unbind_pool(HANDLE)


def set_step(case: AttentionCase) -> None:
    batch = case.batch
    torch.ops.promptmux.set_step(HANDLE, batch.page_table, batch.lengths, batch.query_starts, batch.write_slots)


def attend(case: AttentionCase, layer: int) -> torch.Tensor:
    answers: torch.Tensor = torch.ops.promptmux.attend(
        case.query, case.key, case.value, HANDLE, layer, case.layer.scaling, 20, 0.0, case.layer.sinks
    )
    return answers


def test_attend_is_paged_attention_over_the_bound_layer(
    case: AttentionCase, pools: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    keys, values = pools
    for layer in (0, 1):
        key_pages, value_pages = keys[layer].clone(), values[layer].clone()
        wanted = native_attention(case.query, case.key, case.value, key_pages, value_pages, case.batch, case.layer)

        assert torch.equal(attend(case, layer), wanted)
        torch.testing.assert_close(keys[layer], key_pages, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(values[layer], value_pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("pools")
def test_attend_is_refused_without_step_pool_or_layer(case: AttentionCase) -> None:
    with pytest.raises(RuntimeError, match="no layer 2"):
        attend(case, 2)
    torch.ops.promptmux.clear_step(HANDLE)
    with pytest.raises(RuntimeError, match=f"no step is set for handle {HANDLE}"):
        attend(case, 0)
    torch.ops.promptmux.unbind_pool(HANDLE)
    with pytest.raises(RuntimeError, match=f"no pool is bound to handle {HANDLE}"):
        attend(case, 0)
    with pytest.raises(RuntimeError, match=f"no pool is bound to handle {HANDLE}"):
        set_step(case)


class TwoLayers(torch.nn.Module):
    """Attends twice with the same inputs, which a compiler might be tempted to merge, and uses one answer."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        torch.ops.promptmux.attend(query, key, value, HANDLE, 0, 0.2, 0, 0.0, None)
        answers: torch.Tensor = torch.ops.promptmux.attend(query, key, value, HANDLE, 1, 0.2, 0, 0.0, None)
        return answers * 2


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")  # torch.export's own
def test_exported_graph_keeps_every_call_and_depends_on_the_number_of_tokens_alone(
    case: AttentionCase, pools: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    keys, _ = pools
    arguments = (case.query, case.key, case.value)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(TwoLayers(), arguments, dynamic_shapes=[{0: tokens}] * 3)
    exported = exported.run_decompositions()
    module = exported.module()
    module.graph.eliminate_dead_code()
    module.recompile()
    before = keys[0].clone()

    answers = module(*arguments)

    assert torch.equal(answers, TwoLayers()(*arguments))
    assert not torch.equal(keys[0].nan_to_num(), before.nan_to_num())
    other = make_case(SHAPE, [RowSize(1, 40), RowSize(1, 30)])
    set_step(other)
    torch.ops.promptmux.bind_pool(HANDLE, [other.key_pages] * 2, [other.value_pages] * 2)
    set_step(other)
    arguments = (other.query, other.key, other.value)
    assert torch.equal(module(*arguments), TwoLayers()(*arguments))
