"""When an engine counts as failed, on a clock of the test's own."""

from dataclasses import dataclass

import pytest

from server.runtime.watch import (
    MAX_GAP_S,
    MAX_MARGIN_S,
    MIN_SILENCE_S,
    UNKNOWN_SILENCE_S,
    WATCH_INTERVAL_S,
    EngineWatch,
    max_silence_s,
)
from tests.fakes import EchoEngine


@dataclass
class Watched:
    """An engine that has a row and began its step at `began_s`, and the clock that is watched by."""

    engine: EchoEngine
    now_s: float = 100.0
    began_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, watch: EngineWatch, seconds: float) -> str | None:
        """The first reason that is given while looking regularly for so long."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += WATCH_INTERVAL_S
            self.engine.heartbeat_age_s = self.now_s - self.began_s
            reason = watch.look()
            if reason is not None:
                return reason
        return None


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    engine = EchoEngine(max_waiting_rows=8, load_prompt=lambda ref: pytest.fail("nothing is loaded"))
    engine._rows["row"] = object()  # type: ignore[assignment]
    return Watched(engine)


def test_a_step_that_hangs_is_noticed_within_five_seconds(watched: Watched) -> None:
    watched.engine.usual_step_s = 0.05
    watch = EngineWatch(watched.engine, clock=watched)

    assert watched.wait(watch, 60) == "no step for 4 s"
    assert watched.now_s - watched.began_s < 5.0


def test_a_step_of_a_slow_machine_is_given_what_the_like_of_it_took_and_more(watched: Watched) -> None:
    watched.engine.usual_step_s = 10.0
    watch = EngineWatch(watched.engine, clock=watched)

    assert watched.wait(watch, 29.5) is None
    assert watched.wait(watch, 2) is not None


@pytest.mark.parametrize(
    ("usual_s", "limit_s"),
    [(None, UNKNOWN_SILENCE_S), (0.0, MIN_SILENCE_S), (2.0, 6.0), (100.0, 100.0 + MAX_MARGIN_S)],
)
def test_patience_by_what_is_usual(usual_s: float | None, limit_s: float) -> None:
    assert max_silence_s(usual_s) == limit_s


def test_what_was_never_done_before_is_given_a_minute(watched: Watched) -> None:
    watch = EngineWatch(watched.engine, clock=watched)

    assert watched.wait(watch, UNKNOWN_SILENCE_S - 1) is None
    assert watched.wait(watch, 2) is not None


def test_steps_that_follow_each_other_are_no_silence(watched: Watched) -> None:
    watched.engine.usual_step_s = 0.05
    watch = EngineWatch(watched.engine, clock=watched)
    for _ in range(10):
        assert watched.wait(watch, 3) is None
        watched.began_s = watched.now_s


def test_time_in_which_the_whole_process_stood_still_does_not_count(watched: Watched) -> None:
    watched.engine.usual_step_s = 0.05
    watch = EngineWatch(watched.engine, clock=watched)
    watched.now_s += 3600

    assert watched.wait(watch, MIN_SILENCE_S - MAX_GAP_S - WATCH_INTERVAL_S) is None
    assert watched.wait(watch, 2) is not None


def test_an_engine_without_rows_may_be_silent(watched: Watched) -> None:
    watched.engine.usual_step_s = 0.05
    watch = EngineWatch(watched.engine, clock=watched)
    rows = dict(watched.engine._rows)
    watched.engine._rows.clear()
    assert watched.wait(watch, 100) is None

    watched.engine._rows.update(rows)
    assert watched.wait(watch, MIN_SILENCE_S - WATCH_INTERVAL_S) is None
    assert watched.wait(watch, 1) is not None


def test_an_engine_that_says_that_it_failed_is_believed_at_once(watched: Watched) -> None:
    watch = EngineWatch(watched.engine, clock=watched)
    watched.engine.crash("boom")

    assert watch.look() == "boom"
