"""Tables on terminals of any width, and in pipes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli.output import _column_groups, print_table

COLUMNS = ("virtual token", "norm", "z_score", "nearest")
NEAREST = ["1 ' France' 0.9123", "22 ' Paris' 0.8111", "333 ' French' 0.7999", "4 ' Lyon' 0.7001", "5 ' EU' 0.6543"]
ROWS = [(index, f"{index / 7:.4f}", f"{index / 3:.4f}", NEAREST) for index in range(3)]
LAYERS = tuple(f"{part}.{name}" for part in ("keys", "values") for name in ("mean", "deviation", "minimum", "maximum"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    return monkeypatch


def printed(capsys: pytest.CaptureFixture[str], columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    print_table(columns, rows)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_long_cells_are_wrapped_and_short_ones_stay_whole(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, COLUMNS, ROWS)

    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:4] == ["virtual", "token", "norm", "z_score"]
    for index, norm, z_score, _ in ROWS:
        assert any(line.split()[:3] == [str(index), norm, z_score] for line in lines)
    for item in NEAREST:
        assert sum(item in line for line in lines) == 3, "an item is never broken"
    assert len(lines) == 1 + 3 * 3


def test_more_columns_than_fit_become_tables_that_repeat_the_first(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, ("layer", *LAYERS), [(layer, *range(100, 108)) for layer in range(2)])

    assert max(map(len, lines)) <= 80
    tables = "\n".join(lines).split("\n\n")
    assert len(tables) == 2
    heads, firsts, seconds = zip(*(table.splitlines() for table in tables), strict=True)
    assert [word for head in heads for word in head.split()[1:]] == list(LAYERS)
    assert {head.split()[0] for head in heads} == {"layer"}
    assert [word for line in firsts for word in line.split()[1:]] == [str(number) for number in range(100, 108)]
    assert {line.split()[0] for line in seconds} == {"1"}


def test_long_text_is_wrapped_between_words(terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, ("name", "status", "detail"), [("data folder", "wrong", "what is wrong " * 10)])

    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("data folder  wrong   what is wrong")
    assert " ".join(" ".join(lines[1:]).split()) == "data folder wrong " + " ".join(["what is wrong"] * 10)


def test_table_in_a_pipe_has_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, ("layer", *LAYERS, "nearest"), [(0, *range(8), NEAREST)])

    assert len(lines) == 2
    assert lines[1].endswith(", ".join(NEAREST))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 200))
def test_every_column_has_its_place_and_each_table_the_first(widths: list[int], room: int) -> None:
    groups = _column_groups(widths, room)

    assert [group[0] for group in groups] == [0] * len(groups)
    assert [index for group in groups for index in group[1:]] == list(range(1, len(widths)))
    for group in groups:
        needed = sum(min(widths[index], 24) + 2 for index in group) - 2
        assert needed <= room or len(group) <= 2
