"""The packed attention function, compared with softmax attention spelled out in float64, one query at a time."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.engine.attention import (
    ATTENTION_NAME,
    CONTEXT_ATTRIBUTE,
    StepContext,
    UnsupportedAttentionError,
    attach_context,
    packed_attention,
)
from server.engine.kernels.gather import gather_attention
from server.engine.kv import KvPool, LayerShape, num_pages_for
from server.engine.pages import PAGE_SIZE, PageNumbers
from server.engine.plan import PlanEntry, StepPlan, build_plan

NUM_LAYERS = 2
NUM_PAGES = 96
UNTOUCHED = 7.25
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Heads:
    """How the layers attend. `windows` are one a layer."""

    kv_heads: int = 2
    group: int = 2
    key_dim: int = 8
    value_dim: int = 8
    windows: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    has_sinks: bool = False
    scaling: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.scaling if self.scaling is not None else self.key_dim**-0.5


@dataclass(frozen=True)
class Segment:
    """One row of a step: where it stands, how many tokens it computes, how many pages before its own are not its."""

    start_column: int
    num_tokens: int = 1
    skipped_pages: int = 0


@dataclass
class Step:
    """A step in the making: every row's keys and values of all layers, past ones already in its pages."""

    heads: Heads
    segments: list[Segment]
    seed: int = 0
    pages: list[PageNumbers] = field(init=False)
    keys: list[list[torch.Tensor]] = field(init=False)  # a row, a layer: [kv_heads, columns, key_dim]
    values: list[list[torch.Tensor]] = field(init=False)
    queries: list[list[torch.Tensor]] = field(init=False)  # a row, a layer: [heads, num_tokens, key_dim]

    def __post_init__(self) -> None:
        heads = self.heads
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = LayerShape(heads.kv_heads, heads.key_dim, heads.value_dim)
        self.pool = KvPool(
            [shape] * NUM_LAYERS, row_pages=NUM_PAGES, prefix_pages=0, dtype=heads.dtype, device=CPU, poison_freed=True
        )
        self.pages = []
        unused: list[PageNumbers] = []
        for serial, segment in enumerate(self.segments, start=1):
            unused += [self._allocate(1000 + len(unused) + i, 1) for i in range(segment.skipped_pages)]
            pages = self._allocate(serial, num_pages_for(segment.start_column + segment.num_tokens))
            self.pages.append(pages[torch.randperm(len(pages), generator=self.generator).numpy()])
        for i, skipped in enumerate(unused):
            # Every other unused page is another row's, full of its numbers; the rest are freed and full of NaN.
            if i % 2:
                self.pool.release(skipped, 1000 + i)
            else:
                for tensor in (*self.pool.key_pages, *self.pool.value_pages):
                    tensor[skipped] = UNTOUCHED
        self.keys = [self._random(heads.kv_heads, s, heads.key_dim) for s in self.segments]
        self.values = [self._random(heads.kv_heads, s, heads.value_dim) for s in self.segments]
        self.queries = [
            [t[:, segment.start_column :] for t in self._random(heads.kv_heads * heads.group, segment, heads.key_dim)]
            for segment in self.segments
        ]
        for pages, segment, keys, values in zip(self.pages, self.segments, self.keys, self.values, strict=True):
            for layer in range(NUM_LAYERS):
                for column in range(segment.start_column):
                    page, offset = int(pages[column // PAGE_SIZE]), column % PAGE_SIZE
                    self.pool.key_pages[layer][page, :, offset] = keys[layer][:, column]
                    self.pool.value_pages[layer][page, :, offset] = values[layer][:, column]
        self.sinks = torch.randn(heads.kv_heads * heads.group, generator=self.generator) if heads.has_sinks else None

    def _allocate(self, owner: int, count: int) -> PageNumbers:
        pages = self.pool.allocate(owner, count)
        assert pages is not None
        return pages

    def _random(self, heads: int, segment: Segment, dim: int) -> list[torch.Tensor]:
        shape = (heads, segment.start_column + segment.num_tokens, dim)
        return [torch.randn(shape, generator=self.generator).to(self.heads.dtype) for _ in range(NUM_LAYERS)]

    def plan(self) -> tuple[StepPlan, list[int]]:
        return build_plan(
            [
                PlanEntry(pages, segment.start_column, [0] * segment.num_tokens, segment.num_tokens)
                for pages, segment in zip(self.pages, self.segments, strict=True)
            ]
        )

    def run(self) -> list[list[torch.Tensor]]:
        """Answers a layer, a row: `[num_tokens, heads, value_dim]`."""
        plan, order = self.plan()
        modules = [torch.nn.Identity() for _ in range(NUM_LAYERS)]
        context = StepContext(
            gather_attention,
            pool=self.pool,
            batch=plan.batch(CPU),
            layer_of={id(module): layer for layer, module in enumerate(modules)},
        )
        found = []
        for layer, module in enumerate(modules):
            attach_context(module, context)
            query, key, value = (
                torch.cat([rows[row][layer][:, -self.segments[row].num_tokens :] for row in order], dim=1).unsqueeze(0)
                for rows in (self.queries, self.keys, self.values)
            )
            answers, weights = packed_attention(
                module, query, key, value, None,
                scaling=self.heads.scaling, sliding_window=self.heads.windows[layer], softcap=self.heads.softcap,
                s_aux=self.sinks,
            )  # fmt: skip
            assert weights is None
            assert answers.shape == (1, plan.num_tokens, query.shape[1], value.shape[3])
            parts = dict(zip(order, torch.split(answers[0], np.diff(plan.query_starts).tolist()), strict=True))
            found.append([parts[row] for row in range(len(self.segments))])
        assert context.num_calls == NUM_LAYERS
        return found

    def expected(self, layer: int, row: int) -> torch.Tensor:
        return naive_attention(
            self.queries[row][layer], self.keys[row][layer], self.values[row][layer],
            self.segments[row].start_column, self.heads.scale, self.heads.windows[layer], self.heads.softcap,
            self.sinks,
        )  # fmt: skip


def naive_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start_column: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[num_tokens, heads, value_dim]`, float64: each query alone over the columns that it may see."""
    num_heads, num_tokens, _ = queries.shape
    group = num_heads // keys.shape[0]
    answers = torch.empty(num_tokens, num_heads, values.shape[2], dtype=torch.float64)
    for token in range(num_tokens):
        column = start_column + token
        first = 0 if window is None else max(0, column - window + 1)
        for head in range(num_heads):
            seen = keys[head // group, first : column + 1].double()
            scores = seen @ queries[head, token].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
            answers[token, head] = (weights / total) @ values[head // group, first : column + 1].double()
    return answers


def assert_answers_are_right(step: Step, tolerance: float = 1e-5) -> None:
    found = step.run()
    for layer in range(NUM_LAYERS):
        for row in range(len(step.segments)):
            torch.testing.assert_close(
                found[layer][row].double(), step.expected(layer, row), atol=tolerance, rtol=tolerance
            )


heads = st.builds(
    Heads,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    value_dim=st.sampled_from([4, 8, 12]),
    windows=st.tuples(st.none() | st.integers(1, 9), st.none() | st.integers(1, 9)),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    has_sinks=st.booleans(),
    scaling=st.sampled_from([None, 0.7]),
)
segments = st.builds(
    Segment,
    start_column=st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 31, 32])),
    num_tokens=st.sampled_from([1, 1, 1, 2, 5, 9, 18]),
    skipped_pages=st.sampled_from([0, 0, 1, 2, 6]),
)


@given(heads, st.lists(segments, min_size=1, max_size=6), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_every_token_attends_to_its_own_row_and_to_nothing_else(
    heads: Heads, segments: list[Segment], seed: int
) -> None:
    assert_answers_are_right(Step(heads, segments, seed))


SHAPES = {
    "plain": Heads(),
    "one kv head for all": Heads(kv_heads=1, group=6),
    "no groups": Heads(kv_heads=4, group=1),
    "window": Heads(windows=(4, None)),
    "window of one": Heads(windows=(1, 1)),
    "softcap": Heads(softcap=2.0),
    "sinks": Heads(has_sinks=True, group=3),
    "all at once": Heads(has_sinks=True, softcap=2.0, windows=(3, 5), value_dim=12, scaling=0.5),
    "other value_dim": Heads(value_dim=4),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_step_in_both_precisions(name: str, dtype: torch.dtype) -> None:
    segments = [
        Segment(9), Segment(17), Segment(0), Segment(3, skipped_pages=2), Segment(15, skipped_pages=6),
        Segment(30), Segment(0, num_tokens=7), Segment(8, num_tokens=9), Segment(30, num_tokens=20), Segment(32),
    ]  # fmt: skip
    step = Step(Heads(**(SHAPES[name].__dict__ | {"dtype": dtype})), segments)

    assert_answers_are_right(step, 1e-5 if dtype is torch.float32 else 4e-2)


def test_step_writes_its_own_columns_and_no_others() -> None:
    step = Step(Heads(), [Segment(5), Segment(14, num_tokens=5, skipped_pages=3), Segment(16, skipped_pages=2)])
    expected = [tensor.clone() for tensor in (*step.pool.key_pages, *step.pool.value_pages)]
    step.run()

    for row, (pages, segment) in enumerate(zip(step.pages, step.segments, strict=True)):
        for was, new in zip(expected, [*step.keys[row], *step.values[row]], strict=True):
            for column in range(segment.start_column, segment.start_column + segment.num_tokens):
                was[int(pages[column // PAGE_SIZE]), :, column % PAGE_SIZE] = new[:, column]
    for found, wanted in zip((*step.pool.key_pages, *step.pool.value_pages), expected, strict=True):
        assert torch.equal(found.nan_to_num(nan=-1.0), wanted.nan_to_num(nan=-1.0))


def test_prompt_in_chunks_gives_what_the_whole_gives() -> None:
    whole = Step(Heads(windows=(4, None)), [Segment(0, num_tokens=36)])
    expected = whole.run()
    for cuts in [(5, 36), (1, 2, 36), (15, 16, 17, 36), (16, 32, 36)]:
        start, parts = 0, []
        chunked = Step(Heads(windows=(4, None)), [Segment(0, num_tokens=36)])
        for end in cuts:
            chunked.segments = [Segment(start, num_tokens=end - start)]
            chunked.keys = [[t[:, :end] for t in whole.keys[0]]]
            chunked.values = [[t[:, :end] for t in whole.values[0]]]
            chunked.queries = [[t[:, start:end] for t in whole.queries[0]]]
            parts.append(chunked.run())
            start = end
        for layer in range(NUM_LAYERS):
            torch.testing.assert_close(torch.cat([part[layer][0] for part in parts]), expected[layer][0])


def test_contents_of_neighbours_do_not_move_an_answer_by_a_bit() -> None:
    first = Step(Heads(), [Segment(9), Segment(34), Segment(13, num_tokens=4), Segment(16)])
    other = Step(Heads(), first.segments)
    for row in (1, 2):
        for tensors in (other.keys[row], other.values[row], other.queries[row]):
            for tensor in tensors:
                tensor += 3.0

    before, after = first.run(), other.run()
    for layer in range(NUM_LAYERS):
        for row in (0, 3):
            assert torch.equal(before[layer][row], after[layer][row])
        assert not torch.equal(before[layer][1], after[layer][1])


def call(context: StepContext, **kwargs: Any) -> torch.Tensor:
    module = torch.nn.Identity()
    attach_context(module, context)
    tensor = torch.ones(1, 2, 3, 4)
    mask = kwargs.pop("attention_mask", None)
    return packed_attention(module, tensor, tensor, tensor, mask, **kwargs)[0]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "mask"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"alibi": 1, "window_left": 3}, "alibi, window_left"),
    ],
)
def test_argument_that_would_change_the_result_is_refused_by_name(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=named):
        call(StepContext(gather_attention, probe=[]), **kwargs)


def test_arguments_without_meaning_here_are_let_through() -> None:
    call(
        StepContext(gather_attention, probe=[]),
        position_bias=None,
        is_causal=True,
        output_attentions=False,
        sliding_window=None,
    )


def test_layer_reaches_the_kernel_with_its_own_pages_and_its_way_of_attending() -> None:
    given: list[tuple[Any, ...]] = []

    def kernel(*arguments: Any) -> torch.Tensor:
        given.append(arguments)
        return gather_attention(*arguments)

    step = Step(Heads(), [Segment(3)])
    plan, _ = step.plan()
    module = torch.nn.Identity()
    context = StepContext(kernel, pool=step.pool, batch=plan.batch(CPU), layer_of={id(module): 1})
    attach_context(module, context)
    query, key, value = (torch.cat(rows[0][1:], dim=1)[:, -1:] for rows in (step.queries, step.keys, step.values))
    sinks = torch.zeros(4)
    packed_attention(
        module, query[None], key[None], value[None], None, scaling=0.3, sliding_window=4, softcap=2.0, s_aux=sinks
    )
    ((q, k, v, key_pages, value_pages, batch, layer),) = given
    assert (q.shape, k.shape, v.shape) == ((1, 4, 8), (1, 2, 8), (1, 2, 8))
    assert key_pages is step.pool.key_pages[1]
    assert value_pages is step.pool.value_pages[1]
    assert batch is context.batch
    assert (layer.scaling, layer.sliding_window, layer.softcap) == (0.3, 4, 2.0)
    assert layer.sinks is sinks


def test_layers_with_a_window_are_counted_while_the_model_is_probed() -> None:
    context = StepContext(gather_attention, probe=[])
    call(context, sliding_window=3)
    call(context)
    assert context.num_windowed == 1


def test_forward_pass_without_a_plan_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without a plan"):
        call(StepContext(gather_attention))


def test_probe_records_shapes_and_order_and_answers_causally() -> None:
    context = StepContext(gather_attention, probe=[])
    modules = [torch.nn.Identity(), torch.nn.Identity()]
    generator = torch.Generator().manual_seed(0)
    for number, module in enumerate(modules):
        attach_context(module, context)
        query = torch.randn(1, 4, 6, 8, generator=generator)
        key = torch.randn(1, 2, 6, 8, generator=generator)
        value = torch.randn(1, 2, 6, 4 + number, generator=generator)
        found, _ = packed_attention(module, query, key, value, None, sliding_window=3)
        expected = naive_attention(query[0], key[0], value[0], 0, 8**-0.5, 3, None, None)
        torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)

    assert context.probe == [LayerShape(2, 8, 4), LayerShape(2, 8, 5)]
    assert [context.layer_of[id(module)] for module in modules] == [0, 1]


def test_context_reaches_every_module_without_becoming_part_of_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    names = set(model.state_dict())
    context = StepContext(gather_attention)
    attach_context(model, context)

    assert all(getattr(module, CONTEXT_ATTRIBUTE) is context for module in model.modules())
    assert set(model.state_dict()) == names


def test_function_is_registered_and_asks_for_no_mask() -> None:
    registered = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]

    assert registered is packed_attention
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS
