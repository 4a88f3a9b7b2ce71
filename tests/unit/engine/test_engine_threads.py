"""The engine on its own thread: outputs come from there, and stopping or failing leaves no row without an answer."""

import logging
import threading
from collections.abc import Sequence

import pytest

from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import RowOutput
from server.errors import DrainingError, EngineFailedError
from server.metrics import Metrics
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import make_request

WAIT_S = 60.0


class Listener:
    """Collects what the engine thread delivers; `seen` and `ended` are set by the first token and the last output."""

    def __init__(self, num_rows: int) -> None:
        self.outputs: list[RowOutput] = []
        self.seen, self.ended = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self._num_rows = num_rows

    def __call__(self, outputs: Sequence[RowOutput]) -> None:
        self.outputs += outputs
        self.threads.add(threading.current_thread().name)
        self.seen.set()
        if sum(output.is_last for output in self.outputs) == self._num_rows:
            self.ended.set()


def make_engine(backbone: Backbone) -> Engine:
    config = EngineConfig(audit_share=0.0, kv_cache_bytes=8 << 20)
    prompts = {ref.prefix_key: make_prompt(backbone, ref, seed=0) for ref in (make_ref("a"),)}
    return Engine(backbone, config, Metrics(), lambda ref: prompts[ref.prefix_key])


def test_started_engine_runs_rows_on_its_own_thread(llama: Backbone) -> None:
    engine, listener = make_engine(llama), Listener(num_rows=2)
    engine.start(listener)
    try:
        engine.submit([make_request("row", prompt=make_ref("a")), make_request("bare")])
        assert listener.ended.wait(WAIT_S)
    finally:
        engine.stop(WAIT_S)
    assert listener.threads == {"engine"}
    assert sum(len(output.token_ids) for output in listener.outputs) == 8


def test_stop_tells_the_rows_that_are_left(llama: Backbone) -> None:
    engine, listener = make_engine(llama), Listener(num_rows=2)
    engine.start(listener)
    engine.submit([make_request("row-0", max_tokens=200), make_request("row-1", max_tokens=200)])
    assert listener.seen.wait(WAIT_S)
    engine.stop(WAIT_S)
    last = [output for output in listener.outputs if output.is_last]
    assert sorted(output.row_id for output in last) == ["row-0", "row-1"]
    assert all(isinstance(output.error, DrainingError) for output in last)
    with pytest.raises(DrainingError):
        engine.submit([make_request("late")])


def test_exception_in_the_step_loop_fails_all_rows_and_the_engine(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, listener = make_engine(llama), Listener(num_rows=2)

    def fail(*args: object) -> None:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(engine._results, "collect", fail)
    with caplog.at_level(logging.CRITICAL, logger="server.engine.engine"):
        engine.start(listener)
        engine.submit([make_request("row-0"), make_request("row-1")])
        assert listener.ended.wait(WAIT_S)
        engine.stop(WAIT_S)
    assert {output.row_id for output in listener.outputs} == {"row-0", "row-1"}
    assert all(isinstance(output.error, EngineFailedError) for output in listener.outputs)
    assert engine.status().failure == "MemoryError: no memory is left"
    with pytest.raises(EngineFailedError, match="no memory is left"):
        engine.submit([make_request("late")])
