"""Numbers of single tasks: bounded, separate by tenant, and gone with the task."""

import pytest

from server.runtime import stats
from server.runtime.stats import TaskStatsTable, TaskUse


def use(e2e_s: float = 1.0, **changes: object) -> TaskUse:
    values: dict[str, object] = {
        "rows": 1, "prompt_tokens": 2, "completion_tokens": 3, "finish_reasons": ("stop",), "ttft_s": 0.5,
        "e2e_s": e2e_s,
    }  # fmt: skip
    return TaskUse(**(values | changes))  # type: ignore[arg-type]


def test_unused_task_has_zeros_and_no_percentiles() -> None:
    found = TaskStatsTable().get(("a", "a", "t"))

    assert (found.requests, found.completion_tokens, found.finish_reasons) == (0, 0, {})
    assert (found.e2e.p50, found.e2e.num_samples) == (None, 0)


def test_percentiles_are_over_the_last_window() -> None:
    table = TaskStatsTable()
    for second in range(stats.WINDOW + 100):
        table.add(("a", "a", "t"), use(float(second)))
    found = table.get(("a", "a", "t"))

    assert found.requests == stats.WINDOW + 100
    assert found.e2e.num_samples == stats.WINDOW
    assert found.e2e.p50 == 100 + stats.WINDOW / 2
    assert found.e2e.p99 == 100 + int(stats.WINDOW * 0.99)


def test_row_without_a_token_has_no_time_to_the_first() -> None:
    table = TaskStatsTable()
    table.add(("a", "a", "t"), use(ttft_s=None))

    assert table.get(("a", "a", "t")).ttft.num_samples == 0
    assert table.get(("a", "a", "t")).e2e.num_samples == 1


def test_least_recently_used_tasks_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_TASKS", 2)
    table = TaskStatsTable()
    for task in ("x", "y", "x", "z"):
        table.add(("a", "a", task), use())

    assert [table.get(("a", "a", task)).requests for task in ("x", "y", "z")] == [2, 0, 1]


def test_deleted_task_is_forgotten_for_all_who_asked() -> None:
    table = TaskStatsTable()
    table.add(("a", "shared", "t"), use())
    table.add(("b", "shared", "t"), use())
    table.add(("a", "a", "t"), use())
    table.forget("shared", "t")

    assert table.get(("a", "shared", "t")).requests == table.get(("b", "shared", "t")).requests == 0
    assert table.get(("a", "a", "t")).requests == 1
