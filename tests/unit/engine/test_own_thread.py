"""What runs in a thread of its own comes back as if it had been called, and leaves no thread behind."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from server.engine.own_thread import run_in_own_thread
from tests.unit.engine.stepped import SteppedEngine


def threads_of_forward(monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """Collects the threads in which any module's forward pass runs from now on."""
    seen: set[threading.Thread] = set()
    call = torch.nn.Module.__call__

    def spy(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        seen.add(threading.current_thread())
        return call(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    return seen


def all_threads() -> set[str]:
    """The ids of all of this process, those of teams among them."""
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_result_comes_from_a_thread_that_is_gone() -> None:
    ran_in = run_in_own_thread(threading.current_thread)
    assert ran_in is not threading.current_thread()
    assert not ran_in.is_alive()
    assert ran_in not in threading.enumerate()


def test_exception_passes_through_and_the_thread_is_gone() -> None:
    ran_in: list[threading.Thread] = []

    def fail() -> None:
        ran_in.append(threading.current_thread())
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run_in_own_thread(fail)
    assert not ran_in[0].is_alive()


def test_callers_number_of_threads_applies() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert run_in_own_thread(torch.get_num_threads) == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process in /proc")
def test_team_of_the_threads_parallel_regions_ends_with_it() -> None:
    def work() -> set[str]:
        torch.set_num_threads(3)
        before = all_threads()
        torch.ones(1 << 20).exp().sum()
        return all_threads() - before

    num_threads = torch.get_num_threads()
    try:
        team = run_in_own_thread(work)
    finally:
        torch.set_num_threads(num_threads)
    assert len(team) == 2
    # They have been told to end, and the system takes a moment.
    give_up_at_s = time.monotonic() + 10
    while team & all_threads() and time.monotonic() < give_up_at_s:
        time.sleep(0.001)
    assert not team & all_threads()


def test_loading_a_backbone_computes_nothing_in_the_callers_thread(
    tiny_backbone_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threads_of_forward(monkeypatch)
    Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu", max_model_len=256)
    assert seen
    assert not any(thread.is_alive() for thread in seen)


def test_backbone_that_cannot_be_loaded_says_so_to_the_caller(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="is not a model folder"):
        Backbone.load(str(tmp_path / "nowhere"))


def test_making_an_engine_computes_nothing_in_the_callers_thread(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threads_of_forward(monkeypatch)
    SteppedEngine(llama, max_rows=4, is_deterministic=True)
    llama.set_deterministic(None)
    assert seen
    assert not any(thread.is_alive() for thread in seen)
