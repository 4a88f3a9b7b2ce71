"""A compiled step answers as the eager one does; whatever goes wrong with it, the eager one serves."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
from server.engine.compiled import CompiledForward
from server.engine.forward import PackedForward, embed
from server.engine.kernels.native import NativeUnavailableError, load_native, native_attention
from server.engine.kv import KvPool
from server.engine.linear import prepare_linears
from server.engine.plan import PlanEntry, build_plan
from tests.factories import VOCAB_SIZE, save_tiny_backbone

DTYPE = torch.float32
COMPILE_TIMEOUT_S = 900

pytestmark = pytest.mark.timeout(COMPILE_TIMEOUT_S)


@dataclasses.dataclass
class Backbone:
    """A tiny model run packed, eagerly, and what a compiled step needs to stand beside it."""

    model: PreTrainedModel
    forward: PackedForward
    context: StepContext
    folder: Path

    def compiled(self, cache_dir: Path, **changes: Any) -> CompiledForward:
        arguments: dict[str, Any] = {
            "fingerprint": "f" * 64, "dtype": DTYPE, "form": "plain", "quantization": "none", "cache_dir": cache_dir,
        } | changes  # fmt: skip
        return CompiledForward(self.model, self.folder, **arguments)

    def pool(self) -> KvPool:
        return KvPool(self.forward.layers, row_pages=64, prefix_pages=0, dtype=DTYPE, device=torch.device("cpu"))

    @torch.inference_mode()
    def step(self, compiled: CompiledForward | None, pool: KvPool, entries: list[PlanEntry]) -> torch.Tensor:
        plan, _ = build_plan(entries)
        batch = plan.batch(torch.device("cpu"))
        embeds = embed(self.model, torch.from_numpy(plan.token_ids))
        positions, wanted = torch.from_numpy(plan.positions), torch.from_numpy(plan.logits_tokens)

        def eager() -> torch.Tensor:
            self.context.pool, self.context.batch = pool, batch
            return self.forward._call(embeds, positions, wanted)

        return eager() if compiled is None else compiled.run(eager, embeds, positions, wanted, pool, batch)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    try:
        load_native()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    folder = save_tiny_backbone("gemma2", tmp_path_factory.mktemp("backbone"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="eager")
    model.eval().requires_grad_(False)
    prepare_linears(model, form="plain")
    context = StepContext(kernel=native_attention)
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    return Backbone(model, PackedForward(model, context), context, folder)


@pytest.fixture(scope="module")
def cache_dir(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the backbone's package, made by the real child process."""
    folder = tmp_path_factory.mktemp("cache")
    compiled = backbone.compiled(folder)
    compiled.start()
    join(compiled)
    assert compiled.state == "trial", compiled.reason
    compiled.stop()
    return folder


@pytest.fixture
def ready(backbone: Backbone, cache_dir: Path) -> Iterator[CompiledForward]:
    compiled = backbone.compiled(cache_dir)
    compiled.start()
    join(compiled)
    assert compiled.is_ready, compiled.reason
    yield compiled
    compiled.stop()


def join(compiled: CompiledForward) -> None:
    thread = compiled._thread
    assert thread is not None
    thread.join(COMPILE_TIMEOUT_S)
    assert not thread.is_alive()


def entries(pool: KvPool, lengths: list[int]) -> list[PlanEntry]:
    """Rows that are computed from their first token on, all of their logits wanted."""
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for serial, length in enumerate(lengths, start=1):
        pages = pool.allocate(serial, 4)
        assert pages is not None
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        made.append(PlanEntry(pages, 0, ids, logits_from=0))
    return made


def _counted(step: Any, calls: list[int], *given: torch.Tensor) -> torch.Tensor:
    calls.append(1)
    answer: torch.Tensor = step(*given)
    return answer


def followed(entry: PlanEntry, token: int) -> PlanEntry:
    """The row of `entry`, one token on."""
    return PlanEntry(entry.pages, entry.length, [token], logits_from=0)


@pytest.mark.parametrize("lengths", [[1], [2], [5, 9, 1], [30, 17]])
def test_compiled_logits_are_the_eager_ones_for_any_number_of_tokens(
    backbone: Backbone, ready: CompiledForward, lengths: list[int]
) -> None:
    eager_pool, pool = backbone.pool(), backbone.pool()
    rows = entries(eager_pool, lengths)
    for given in (rows, [followed(row, 7) for row in rows]):
        plan, _ = build_plan(given)
        embeds = embed(backbone.model, torch.from_numpy(plan.token_ids))
        with torch.inference_mode():
            found = ready._call(
                embeds, torch.from_numpy(plan.positions), torch.from_numpy(plan.logits_tokens), pool,
                plan.batch(torch.device("cpu")),
            )  # fmt: skip
        expected = backbone.step(None, eager_pool, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for layer in range(eager_pool.num_layers):
        for row in rows:
            page = int(row.pages.numbers[0]) if hasattr(row.pages, "numbers") else int(row.pages[0])
            ours, theirs = pool.key_pages[layer][page], eager_pool.key_pages[layer][page]
            columns = min(16, row.length + 1)
            torch.testing.assert_close(ours[:, :columns], theirs[:, :columns], rtol=1e-4, atol=1e-4)


def test_the_first_steps_of_a_size_are_answered_eagerly_and_then_the_faster_way_is_kept(
    backbone: Backbone, ready: CompiledForward
) -> None:
    pool = backbone.pool()
    rows = entries(pool, [6])
    expected = backbone.step(None, pool, rows)
    for _ in range(4):
        assert torch.equal(backbone.step(ready, pool, rows), expected)
    assert set(ready._trials) == {4}
    assert ready._trials[4].is_over
    for is_faster in (True, False):
        ready._trials[4].compiled_s[:] = [0.0 if is_faster else 1e9]
        assert ready.faster_sizes == ([4] if is_faster else [])
        calls: list[int] = []
        step: Any = ready._step
        ready._step = partial(_counted, step, calls)
        torch.testing.assert_close(backbone.step(ready, pool, rows), expected, rtol=1e-4, atol=1e-4)
        ready._step = step
        assert bool(calls) is is_faster


@pytest.mark.parametrize("how", ["raises", "differs", "is not a number"])
def test_a_package_that_fails_is_given_up_and_eager_serves(
    backbone: Backbone, ready: CompiledForward, how: str
) -> None:
    step: Any = ready._step

    def broken(*given: torch.Tensor) -> torch.Tensor:
        if how == "raises":
            raise RuntimeError("out of order")
        answer: torch.Tensor = step(*given)
        return answer.flip(-1) if how == "differs" else answer * float("nan")

    ready._step = broken
    pool = backbone.pool()
    rows = entries(pool, [6])
    assert torch.equal(backbone.step(ready, pool, rows), backbone.step(None, pool, rows))
    assert ready.state == "failed"
    assert ready.reason is not None
    assert not ready.is_ready


def test_a_second_start_loads_what_the_first_compiled(
    backbone: Backbone, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    compiled = backbone.compiled(cache_dir)
    compiled.start()
    join(compiled)
    assert compiled.is_ready, compiled.reason
    compiled.stop()
    assert compiled.state == "stopped"


def test_a_package_is_a_small_file_without_the_weights(backbone: Backbone, cache_dir: Path) -> None:
    compiled = backbone.compiled(cache_dir)
    package = compiled.package.read_bytes()
    assert all(p.numpy().tobytes()[:256] not in package for p in backbone.model.parameters() if p.dim() > 1)
    assert all(b.numpy().tobytes()[:256] not in package for b in backbone.model.buffers() if b.dim() > 1)
    assert not list(compiled.package.parent.glob(".compile-*"))
    assert not list(compiled.package.parent.glob("*.build"))


def test_other_backbones_dtypes_and_forms_have_packages_and_handles_of_their_own(
    backbone: Backbone, tmp_path: Path
) -> None:
    variants: list[dict[str, Any]] = [{}, {"fingerprint": "e"}, {"dtype": torch.bfloat16}, {"form": "native"}]
    made = [backbone.compiled(tmp_path, **changes) for changes in variants]
    assert len({compiled.package for compiled in made}) == len({compiled.handle for compiled in made}) == len(made)
    assert made[0].handle == backbone.compiled(tmp_path).handle < 2**63


def test_a_second_engine_of_the_process_does_not_share_the_first_ones_graph(
    backbone: Backbone, ready: CompiledForward, cache_dir: Path
) -> None:
    second = backbone.compiled(cache_dir)
    second.start()
    assert second.state == "failed"
    second.stop()
    assert ready.is_ready


def test_a_compiler_that_fails_leaves_eager_and_a_reason(backbone: Backbone, tmp_path: Path) -> None:
    compiled = backbone.compiled(tmp_path, form="nonsense")
    compiled._request = dataclasses.replace(compiled._request, folder=str(tmp_path / "nowhere"))
    compiled.start()
    join(compiled)
    assert compiled.state == "failed"
    assert "ended with" in str(compiled.reason)
    pool = backbone.pool()
    rows = entries(pool, [3])
    assert torch.equal(backbone.step(compiled, pool, rows), backbone.step(None, pool, rows))
    compiled.stop()


def test_weights_in_onednns_layout_are_not_compiled_for(backbone: Backbone, tmp_path: Path) -> None:
    compiled = backbone.compiled(tmp_path, form="onednn")
    compiled.start()
    assert compiled.state == "failed"
    compiled.stop()


def test_stop_ends_the_compiler(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Any] = []
    popen = subprocess.Popen

    def sleeper(command: list[str], **given: Any) -> Any:
        children.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **given))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    compiled = backbone.compiled(tmp_path)
    compiled.start()
    compiled.stop()
    assert compiled.state == "stopped"
    assert all(child.poll() is not None for child in children)
    assert not compiled.package.exists()


def test_the_request_survives_its_way_to_the_child(backbone: Backbone, tmp_path: Path) -> None:
    request = backbone.compiled(tmp_path)._request
    assert json.loads(request.to_json()) == dataclasses.asdict(request)
