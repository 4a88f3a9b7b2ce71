"""The deterministic mode's kernel, and the proof that a backbone is asked for before it is served so."""

from dataclasses import dataclass, field

import pytest
import torch

from server.engine.attention import Kernel
from server.engine.backbone import Backbone
from server.engine.forward import Forward
from server.engine.gate import check_deterministic
from server.engine.kernels.choose import choose_kernel
from server.engine.kernels.triton_attention import triton_attention
from server.engine.kv import KvPool
from server.engine.plan import StepPlan


@dataclass
class Recorded:
    """A forward pass that says what it was given."""

    forward: Forward
    num_tokens: list[int] = field(default_factory=list)
    num_columns: list[int] = field(default_factory=list)
    num_pages: int = 0

    def __post_init__(self) -> None:
        self.layers = self.forward.layers

    def run(self, pool: KvPool, plan: StepPlan) -> torch.Tensor:
        self.num_tokens.append(plan.num_tokens)
        self.num_columns.append(int(plan.lengths.max()))
        self.num_pages = pool.row_pages
        return self.forward.run(pool, plan)


def check(backbone: Backbone, recorded: Recorded, max_rows: int, max_columns: int = 256) -> bool:
    return check_deterministic(
        recorded, max_rows, backbone.vocab_size, backbone.dtype, backbone.device, max_columns
    )  # fmt: skip


def test_triton_divides_no_row_in_the_deterministic_mode() -> None:
    cuda = torch.device("cuda")
    assert choose_kernel(cuda) == ("triton", triton_attention)
    name, kernel = choose_kernel(cuda, is_deterministic=True)
    assert name == "triton"
    assert (kernel.func, kernel.keywords) == (triton_attention, {"num_splits": 1})  # type: ignore[attr-defined]


def test_backbone_on_triton_changes_its_kernel_with_the_mode_and_back(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = llama._context.kernel
    kernels: dict[bool, Kernel] = {True: lambda *args: own(*args), False: own}
    monkeypatch.setattr(llama, "kernel", "triton")
    monkeypatch.setattr(
        "server.engine.backbone.choose_kernel",
        lambda device, *, is_deterministic: ("triton", kernels[is_deterministic]),
    )
    try:
        llama.set_deterministic(4)
        assert llama._context.kernel is kernels[True]
    finally:
        llama.set_deterministic(None)
    assert llama._context.kernel is own


@pytest.mark.parametrize("max_rows", [1, 4, 300])
def test_proof_fills_a_few_rows_whatever_the_limit(llama: Backbone, max_rows: int) -> None:
    recorded = Recorded(llama._forward)
    llama._forward.decode_tokens = max_rows  # type: ignore[attr-defined]
    try:
        assert check(llama, recorded, max_rows)
    finally:
        llama._forward.decode_tokens = None  # type: ignore[attr-defined]
    assert max(recorded.num_tokens) <= max(max_rows, 512)
    assert sum(n for n in recorded.num_tokens if n > max_rows) <= 8 * 512
    assert max(recorded.num_columns) == 33
    assert recorded.num_pages <= max_rows + 16


@pytest.mark.parametrize("max_columns", [1, 16, 17, 40])
def test_proof_stays_within_the_columns_that_the_model_has(llama: Backbone, max_columns: int) -> None:
    recorded = Recorded(llama._forward)
    check(llama, recorded, 4, max_columns)
    assert max(recorded.num_columns) <= max_columns
