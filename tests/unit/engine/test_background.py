"""Work in the gaps, on a clock that only the test moves."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from server.engine.background import MAX_DEBT_S, BackgroundStopped, BackgroundTurns, GiveWay

PART_S = 0.005
STEP_S = 0.01


@dataclass
class World:
    """A serving side whose steps take `STEP_S`, and work of parts that take `PART_S`, told of in `history`."""

    share: float = 0.2
    num_steps_wanted: int = 0
    now_s: float = 0.0
    is_stopping: bool = False
    history: list[str] = field(default_factory=list)
    times: list[tuple[float, bool]] = field(default_factory=list)
    num_parts: int = 10
    at_part: Callable[[int], None] = lambda part: None
    num_beats: int = 0

    def __post_init__(self) -> None:
        self.turns = BackgroundTurns(
            has_rows=lambda: self.num_steps_wanted > 0,
            serve=self.serve,
            is_stopping=lambda: self.is_stopping,
            beat=self.beat,
            share=self.share,
            on_time=lambda seconds, is_beside_rows: self.times.append((seconds, is_beside_rows)),
            clock=lambda: self.now_s,
        )
        self.turns.set_work(self)

    def beat(self) -> None:
        self.num_beats += 1

    def serve(self) -> bool:
        if self.num_steps_wanted == 0:
            return False
        self.num_steps_wanted -= 1
        self.now_s += STEP_S
        self.history.append("step")
        return True

    def run(self, give_way: GiveWay) -> bool:
        if not self.num_parts:
            return False
        for part in range(self.num_parts):
            self.now_s += PART_S
            self.history.append("part")
            self.at_part(part)
            give_way()
        return True

    def turn(self) -> bool:
        """As the engine's."""
        self.turns.begin_turn()
        has_served = self.serve()
        return self.turns.end_turn(has_served=has_served) or has_served

    @property
    def work_s(self) -> float:
        return self.history.count("part") * PART_S


def test_work_that_nobody_waits_beside_runs_at_once() -> None:
    world = World()

    assert world.turn()

    assert world.history == ["part"] * 10
    assert world.times[:10] == [(pytest.approx(PART_S), False)] * 10
    assert world.num_beats == 10


def test_without_work_to_do_the_engine_may_sleep() -> None:
    world = World(num_parts=0)

    assert not world.turn()
    assert world.history == []


def test_a_row_that_comes_waits_for_one_part_and_no_more() -> None:
    world = World()

    def arrive(part: int) -> None:
        if part == 3:
            world.num_steps_wanted = 4

    world.at_part = arrive
    world.turn()

    came = world.history.index("step")
    assert world.history[:came] == ["part"] * 4
    assert world.history.count("step") == 4


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_beside_rows_work_takes_its_share_of_the_time_and_no_more(share: float) -> None:
    world = World(share=share, num_steps_wanted=2000)

    while world.num_steps_wanted > 0:
        world.turn()

    assert world.work_s / world.now_s == pytest.approx(share, rel=0.05)
    # Never are many parts in a row, though two steps of work are as long as twenty steps of serving.
    gaps = "".join("p" if entry == "part" else "s" for entry in world.history).split("s")
    assert max(map(len, gaps[:-1])) <= 3


def test_a_share_of_nothing_waits_until_no_row_is_left() -> None:
    world = World(share=0.0, num_steps_wanted=50)

    while world.num_steps_wanted > 0:
        world.turn()
    assert "part" not in world.history

    world.turn()
    assert world.history.count("part") == 10


def test_time_without_rows_is_not_paid_back_by_those_that_come_after_it() -> None:
    world = World(num_parts=1)
    for _ in range(100):
        world.turn()
    world.num_steps_wanted = 12

    while world.num_steps_wanted > 0:
        world.turn()

    # 12 steps of 10 ms earn 30 ms: nothing that was used before counts against the work, and nothing was saved up.
    assert 3 <= world.history[100:].count("part") <= 6


def test_one_part_that_took_very_long_is_forgiven() -> None:
    world = World(num_parts=1, num_steps_wanted=1000)

    def dawdle(part: int) -> None:
        world.now_s += 100.0
        world.at_part = lambda part: None

    world.at_part = dawdle
    while "part" not in world.history:
        world.turn()
    first = world.history.index("part")
    while world.history.count("part") < 2:
        world.turn()

    owed_s = MAX_DEBT_S / (0.2 / 0.8)
    assert (len(world.history) - first) * STEP_S == pytest.approx(owed_s, rel=0.05)


def test_rows_that_cannot_run_keep_the_work_from_nothing() -> None:
    world = World()
    world.num_steps_wanted = 1
    world.serve = lambda: False  # type: ignore[method-assign]
    world.turns._serve = world.serve

    world.turns.begin_turn()
    assert world.turns.end_turn(has_served=False)

    assert world.history == ["part"] * 10


def test_an_engine_that_stops_leaves_the_work_at_its_next_boundary() -> None:
    world = World()

    def stop(part: int) -> None:
        world.is_stopping = part == 4

    world.at_part = stop
    with pytest.raises(BackgroundStopped):
        world.turn()

    assert world.history == ["part"] * 5


def test_a_fault_of_serving_is_the_engines_and_not_the_works() -> None:
    world = World()
    caught: list[BaseException] = []

    def break_down() -> bool:
        raise RuntimeError("the device is gone")

    def run(give_way: GiveWay) -> bool:
        try:
            give_way()
        except Exception as error:
            caught.append(error)
        return True

    world.turns._serve = break_down
    world.run = run  # type: ignore[method-assign]
    world.num_steps_wanted = 1
    world.turns.begin_turn()

    with pytest.raises(RuntimeError, match="the device is gone"):
        world.turns.end_turn(has_served=False)
    assert caught == []


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_to_serve_with_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="leaves nothing"):
        World(share=share)
