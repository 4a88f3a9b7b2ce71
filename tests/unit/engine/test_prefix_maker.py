"""Prompts that are compiled in one pass get the prefixes that they would get alone, and fail for themselves only."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.forward import PackedForward
from server.engine.gate import check_shared_passes
from server.engine.kv import KvPool
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.request import PromptRef
from server.engine.residency import MAX_COLUMNS_A_PASS
from server.errors import IsolationError, NumericalError, UnavailableError
from tests.unit.engine.prompts import make_prompt
from tests.unit.engine.residency_bench import Bench
from tests.unit.engine.test_residency import assert_equal, own_keys_values, tensors_of

LENGTHS = (5, 16, 1, 37, 20)


@pytest.fixture
def sharing(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setattr(llama, "prefixes_share_passes", True)
    return llama


@pytest.fixture
def passes(sharing: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the rows of each pass."""
    seen: list[list[int]] = []
    forward = sharing.forward

    def count(pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        seen.append([entry.num_tokens for entry in plan.entries])
        return forward(pool, plan, sampled)

    monkeypatch.setattr(sharing, "forward", count)
    return seen


def asked(
    bench: Bench, lengths: Sequence[int] = LENGTHS, *, kind: str = "embeddings", name: str | None = None
) -> list[PromptRef]:
    """Prompts that have arrived in the host tier and are wanted on the device."""
    refs = [bench.add(f"{name or kind}-{i}", k=k, kind=kind, seed=i) for i, k in enumerate(lengths)]
    for ref in refs:
        bench.residency.bring(ref)
    assert bench.arrive() == []
    return refs


def test_prompts_that_share_a_pass_get_what_the_model_itself_keeps_of_each_alone(
    sharing: Backbone, passes: list[list[int]]
) -> None:
    bench = Bench(sharing)
    refs = asked(bench)
    assert bench.residency.compile_wanted(0.0) == []
    assert [sorted(one) for one in passes] == [sorted(LENGTHS)]
    for index, ref in enumerate(refs):
        prefix = bench.residency.acquire(ref)
        vectors = make_prompt(sharing, ref, seed=index).values
        assert_equal(tensors_of(bench.pool, prefix), own_keys_values(sharing, vectors), tolerance=2e-5)
    bench.residency.check_invariants()


def test_prompts_are_compiled_one_by_one_where_their_bits_would_depend_on_company(
    llama: Backbone, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "prefixes_share_passes", False)
    bench = Bench(llama)
    asked(bench)
    assert bench.residency.compile_wanted(60.0) == []
    assert passes == [[k] for k in LENGTHS]


def test_pass_has_a_largest_size(sharing: Backbone, passes: list[list[int]]) -> None:
    bench = Bench(sharing, prefix_pages=64)
    asked(bench, [48] * 5)
    assert bench.residency.compile_wanted(60.0) == []
    assert [len(one) for one in passes] == [MAX_COLUMNS_A_PASS // 48, 2]


def test_trained_keys_and_values_need_no_pass_and_keep_their_place_in_the_order(
    sharing: Backbone, passes: list[list[int]]
) -> None:
    bench = Bench(sharing)
    refs = [*asked(bench, [3, 4]), *asked(bench, [5], kind="prefix"), *asked(bench, [6], name="last")]
    assert bench.residency.compile_wanted(60.0) == []
    assert [sorted(one) for one in passes] == [[3, 4], [6]]
    assert all(bench.where(ref) == ["device"] for ref in refs)


def test_prompt_that_is_not_finite_leaves_those_of_its_pass_alone(sharing: Backbone) -> None:
    bench = Bench(sharing)
    refs = asked(bench, [20, 20, 20])
    broken = bench.residency.host.get(refs[1].prefix_key)
    assert broken is not None
    broken.values[3] = np.nan
    ((failed, error),) = bench.residency.compile_wanted(0.0)
    assert (failed, type(error)) == (refs[1], NumericalError)
    for index in (0, 2):
        vectors = make_prompt(sharing, refs[index], seed=index).values
        prefix = bench.residency.acquire(refs[index])
        assert_equal(tensors_of(bench.pool, prefix), own_keys_values(sharing, vectors), tolerance=2e-5)
    bench.residency.check_invariants()


def test_pass_that_fails_is_made_again_prompt_by_prompt(sharing: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(sharing)
    refs = asked(bench, [20, 7, 20])
    forward = sharing.forward

    def fail_with_seven(pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        if any(entry.num_tokens == 7 for entry in plan.entries):
            raise RuntimeError("out of memory")
        return forward(pool, plan, sampled)

    monkeypatch.setattr(sharing, "forward", fail_with_seven)
    ((failed, error),) = bench.residency.compile_wanted(0.0)
    assert (failed, type(error)) == (refs[1], UnavailableError)
    assert [bench.where(ref) for ref in refs] == [["device"], ["host"], ["device"]]
    bench.residency.check_invariants()
    for ref in refs:
        bench.residency.evict(ref.prefix_key)
    bench.assert_nothing_is_left()


def test_rows_of_a_shared_pass_that_are_mixed_up_are_caught_and_nothing_is_kept(
    sharing: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_writes(entries: Sequence[PlanEntry]) -> tuple[StepPlan, list[int]]:
        plan, order = build_plan(entries)
        plan.write_slots[:] = plan.write_slots[::-1].copy()
        return plan, order

    bench = Bench(sharing)
    refs = asked(bench, [16, 16])
    monkeypatch.setattr("server.engine.prefix_maker.build_plan", swap_writes)
    failed = bench.residency.compile_wanted(60.0)
    assert [(ref, type(error)) for ref, error in failed] == [(ref, IsolationError) for ref in refs]
    bench.assert_nothing_is_left()


def test_prompts_of_one_pass_do_not_take_each_others_room(sharing: Backbone, passes: list[list[int]]) -> None:
    bench = Bench(sharing, prefix_pages=4)
    refs = asked(bench, [32, 32, 32])
    assert bench.residency.compile_wanted(60.0) == []
    assert passes == [[32, 32]]
    assert [bench.where(ref) for ref in refs] == [["device"], ["device"], ["host"]]
    bench.residency.check_invariants()


def test_prompts_of_a_later_pass_do_not_take_the_room_of_an_earlier_one(
    sharing: Backbone, passes: list[list[int]]
) -> None:
    bench = Bench(sharing, prefix_pages=4)
    refs = [*asked(bench, [32], kind="prefix"), *asked(bench, [32, 32])]
    assert bench.residency.compile_wanted(60.0) == []
    assert passes == [[32]]
    assert bench.where(*refs) == ["device", "device", "host"]


def test_room_is_made_for_all_prompts_of_a_pass(sharing: Backbone, passes: list[list[int]]) -> None:
    bench = Bench(sharing, prefix_pages=4)
    before = asked(bench, [32, 32])
    assert bench.residency.compile_wanted(60.0) == []
    refs = asked(bench, [32, 32], name="later")
    assert bench.residency.compile_wanted(60.0) == []
    assert passes == [[32, 32], [32, 32]]
    assert bench.where(*before, *refs) == ["host", "host", "device", "device"]
    bench.residency.check_invariants()


def test_backbone_whose_bits_depend_on_company_is_found_out(llama: Backbone) -> None:
    class Leaky:
        layers = llama.layers

        def run(self, pool: KvPool, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
            forward = llama._forward
            assert isinstance(forward, PackedForward)
            logits = forward.run(pool, plan, sampled)
            if len(plan.entries) > 3:
                slot = int(plan.write_slots[0])
                pool.key_pages[0][slot // 16, :, slot % 16] += 1e-6
            return logits

    assert not check_shared_passes(Leaky(), llama.hidden_size, llama.dtype, llama.device)
