"""A compiled step answers as the eager one does; whatever goes wrong with it, the eager one serves."""

import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
from server.engine.built_files import publish
from server.engine.compile_worker import CompileRequest
from server.engine.compiled import CompiledForward
from server.engine.forward import PackedForward, embed
from server.engine.kernels.native import NativeUnavailableError, load_native, native_attention
from server.engine.kv import KvPool
from server.engine.linear import prepare_linears
from server.engine.plan import PlanEntry, build_plan
from server.engine.trial import NUM_STEPS
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
        for entry, first in zip(plan.entries, plan.query_starts[:-1].tolist(), strict=True):
            if entry.vectors is not None:
                embeds[first : first + entry.num_tokens] = entry.vectors
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
    for _ in range(NUM_STEPS):
        assert torch.equal(backbone.step(ready, pool, rows), expected)
    assert set(ready._trials) == {4}
    assert ready._trials[4].is_over
    for is_faster in (True, False):
        ready._trials[4].compiled_s[:] = [0.0 if is_faster else 1e9] * NUM_STEPS
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
    # What torch unpacks of its own accord goes here, where nothing can be put.
    monkeypatch.setenv("TMPDIR", str(cache_dir / "nowhere"))
    compiled = backbone.compiled(cache_dir)
    compiled.start()
    join(compiled)
    assert compiled.is_ready, compiled.reason
    compiled.stop()
    assert compiled.state == "stopped"
    assert not [path for path in (cache_dir / "compiled").iterdir() if path.is_dir()]


@pytest.mark.parametrize("damage", ["cut short", "no package"])
def test_a_package_that_does_not_load_is_made_again_once(
    backbone: Backbone, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    compiled = backbone.compiled(tmp_path)
    path, sound = compiled._package.path, backbone.compiled(cache_dir)._package.path
    calls: list[bool] = []

    def make_again(request: CompileRequest, **_: Any) -> None:
        calls.append(path.exists())
        publish_copy(sound, path)

    monkeypatch.setattr("server.engine.package.run_child", make_again)
    path.parent.mkdir()
    if damage == "cut short":
        publish_copy(sound, path)
        os.truncate(path, path.stat().st_size // 2)
    else:
        (tmp_path / "made").write_bytes(b"no package")
        publish(tmp_path / "made", path)

    compiled.start()
    join(compiled)

    assert compiled.is_ready, compiled.reason
    assert calls == [False]
    compiled.stop()


def publish_copy(source: Path, path: Path) -> None:
    made = path.with_name("made")
    shutil.copyfile(source, made)
    publish(made, path)


def test_a_package_is_a_small_file_without_the_weights(backbone: Backbone, cache_dir: Path) -> None:
    compiled = backbone.compiled(cache_dir)
    package = compiled._package.path.read_bytes()
    assert all(p.numpy().tobytes()[:256] not in package for p in backbone.model.parameters() if p.dim() > 1)
    assert all(b.numpy().tobytes()[:256] not in package for b in backbone.model.buffers() if b.dim() > 1)
    assert not [path for path in compiled._package.path.parent.iterdir() if path.is_dir()]


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
    compiled._package.request = dataclasses.replace(compiled._package.request, folder=str(tmp_path / "nowhere"))
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
    children: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
    popen, deaf = subprocess.Popen, tmp_path / "deaf"

    def sleeper(command: list[str], **given: Any) -> "subprocess.Popen[bytes]":
        # Deaf to the polite signal.
        child = popen(["/bin/sh", "-c", f"trap '' TERM; touch {deaf}; while :; do sleep 600; done"], **given)
        children.put(child)
        return child

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    monkeypatch.setattr("server.engine.compile_child._TERM_S", 0.3)
    compiled = backbone.compiled(tmp_path)
    compiled.start()
    child = children.get(timeout=60)
    give_up_s = time.monotonic() + 60
    while not deaf.exists() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert child.poll() is None
    compiled.stop()
    assert compiled.state == "stopped"
    assert child.poll() == -signal.SIGKILL
    assert not compiled._package.path.exists()
    assert not list(tmp_path.glob("compiled/*.build"))


@pytest.mark.parametrize(
    ("fault", "reason"), [("no compiler", "no C[+][+] compiler"), ("no memory", "memory are free, too little")]
)
def test_nothing_is_compiled_without_a_compiler_or_memory(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    compiled = backbone.compiled(tmp_path)
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        needed = sum(parameter.nbytes for parameter in backbone.model.parameters())
        monkeypatch.setattr("server.engine.compile_child.available_bytes", lambda: needed)
    compiled.start()
    join(compiled)
    assert compiled.state == "failed"
    assert re.search(reason, str(compiled.reason))
    compiled.stop()


def test_a_size_on_trial_is_not_settled_until_it_was_tried_often_enough(
    backbone: Backbone, ready: CompiledForward
) -> None:
    pool = backbone.pool()
    rows = entries(pool, [6])
    assert ready.is_settled
    for is_settled in [False] * (NUM_STEPS - 1) + [True]:
        backbone.step(ready, pool, rows)
        assert ready.is_settled is is_settled


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_row_of_nan_neither_ends_nor_hides_a_trial(
    backbone: Backbone, ready: CompiledForward, order: tuple[int, ...]
) -> None:
    pool = backbone.pool()
    clean, spoiled = entries(pool, [6, 5])
    nan = torch.full((5, backbone.model.config.hidden_size), float("nan"))
    spoiled = PlanEntry(spoiled.pages, 0, spoiled.token_ids, logits_from=0, vectors=nan)
    both = [(clean, spoiled)[place] for place in order]
    for _ in range(4):
        backbone.step(ready, pool, [spoiled])
    assert not ready._trials[4].differences
    for _ in range(NUM_STEPS):
        backbone.step(ready, pool, both)
    assert ready._trials[8].is_over
    assert ready.state == "trial", ready.reason
