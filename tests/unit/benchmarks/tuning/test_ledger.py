"""Finished cells survive whatever happens to the process."""

from pathlib import Path

import pytest

from benchmarks.tuning.cells import Cell
from benchmarks.tuning.ledger import Ledger, LedgerError, read_ledger
from tests.unit.benchmarks.tuning.cell_records import make_record

RECORDS = [make_record(Cell(task="a", method="lora", seed=seed), 0.25) for seed in range(3)]


def append(path: Path, count: int) -> None:
    with Ledger(path) as ledger:
        for record in RECORDS[:count]:
            ledger.append(record)


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    assert read_ledger(path) == []
    append(path, 3)
    assert read_ledger(path) == RECORDS


@pytest.mark.parametrize("num_lost", [1, 2, 40])
def test_a_line_that_was_cut_off_is_passed_over_and_dropped_by_the_next_writer(tmp_path: Path, num_lost: int) -> None:
    path = tmp_path / "cells.jsonl"
    append(path, 2)
    path.write_bytes(path.read_bytes()[:-num_lost])
    assert read_ledger(path) == RECORDS[:1]

    with Ledger(path) as ledger:
        ledger.append(RECORDS[2])
    assert read_ledger(path) == [RECORDS[0], RECORDS[2]]


def test_a_whole_line_that_is_no_record_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    append(path, 1)
    path.write_text(path.read_text() + path.read_text().replace('"seconds":10.0', '"seconds":"x"'))
    with pytest.raises(LedgerError, match=r"cells\.jsonl:2: training\.seconds"):
        read_ledger(path)


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with Ledger(path), pytest.raises(LedgerError, match="another run"):
        append(path, 1)
    append(path, 1)
    assert read_ledger(path) == RECORDS[:1]
