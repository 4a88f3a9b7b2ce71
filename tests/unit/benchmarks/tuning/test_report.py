"""The page says what was measured, how often, and what is missing; and nothing else."""

from pathlib import Path

import pytest

from benchmarks.tuning.cells import LATENCY, SWEEP, Cell, K, plan
from benchmarks.tuning.figures import Difference, Figure, Results, difference
from benchmarks.tuning.plots import write_plots
from benchmarks.tuning.report import NOTHING, PageError, fill_page, render_blocks
from tests.unit.benchmarks.tuning.cell_records import make_latency_record, make_record

PAGE = Path(__file__).resolve().parents[4] / "docs" / "tuning-results.md"
VOCAB = [
    Cell(task="word-sentiment", method="prompt_tuning", init="vocab", k=K, seed=seed) for seed in range(3)
]  # fmt: skip
RECORDS = [make_record(cell, score, label_accuracy=0.9) for cell, score in zip(VOCAB, (0.5, 0.6, 0.7), strict=True)]
NONE = make_record(Cell(task="word-sentiment", method="none"), 0.0)
PLANNED = plan(["word-sentiment", "number-words"], [0, 1, 2], {"word-sentiment": ("a", "b")})


def test_a_figure_has_its_mean_spread_and_number_of_seeds() -> None:
    blocks = render_blocks(Results([NONE, *RECORDS]), PLANNED)

    assert "| prompt tuning, vocabulary | 0.60 ± 0.10 (3) | 0.60 |" in blocks["accuracy"]
    assert "| no prompt | 0.00 (1) | 0.00 |" in blocks["accuracy"]
    assert "| prompt tuning, vocabulary | 0.90 ± 0.00 (3) |" in blocks["labels"]
    assert "| word-sentiment | 9 | 2 | 100 | 2 | 0.60 |" in blocks["tasks"]
    assert "| prompt tuning, vocabulary | 1,000 | 10 | 4.8 | 2 | 123 | 3 |" in blocks["costs"]


def test_what_was_not_measured_is_a_dash_and_has_no_mean() -> None:
    other = make_record(Cell(task="number-words", method="none"), 0.1)
    lines = render_blocks(Results([NONE, *RECORDS, other]), PLANNED)["accuracy"].splitlines()

    assert "| prompt tuning, vocabulary | 0.60 ± 0.10 (3) | – | – |" in lines
    assert "| LoRA | – | – | – |" in lines
    assert "| no prompt | 0.00 (1) | 0.10 (1) | 0.05 |" in lines


def test_missing_cells_are_listed_and_counted() -> None:
    missing = render_blocks(Results(RECORDS), PLANNED)["missing"]

    assert f"{len(PLANNED) - 3} of {len(PLANNED)} planned cells were not made:" in missing
    assert "- lora: word-sentiment (3), number-words (3)" in missing
    assert "- prompt_tuning, vocab, k=20: number-words (3)" in missing
    everything = Results([make_record(cell) for cell in PLANNED])
    assert render_blocks(everything, PLANNED)["missing"].startswith("Nothing")


def test_an_empty_ledger_makes_no_figure() -> None:
    blocks = render_blocks(Results([]), PLANNED)
    assert all(blocks[name] == NOTHING for name in blocks if name not in ("missing", "papers"))
    assert all(line.endswith("| – | – | not measured |") for line in blocks["papers"].splitlines()[2:])


def test_the_later_of_two_records_of_a_cell_counts() -> None:
    again = make_record(VOCAB[0], 1.0)
    assert Results([RECORDS[0], again]).exact_match([("prompt_tuning", "vocab", K)], "word-sentiment") == Figure(
        1.0, None, 1
    )


def test_sweep_and_latency_have_their_tables() -> None:
    sweep = [make_record(Cell(task="word-sentiment", method="prompt_tuning", init="vocab", k=k, seed=0)) for k in SWEEP]
    latency = make_latency_record(Cell(task="word-sentiment", method=LATENCY, form="prompt", k=5))
    blocks = render_blocks(Results([*sweep, latency]), PLANNED)

    assert "| word-sentiment | 0.50 (1) | 0.50 (1) | – | 0.50 (1) | 0.50 (1) |" in blocks["sweep"]
    assert "P-Tuning v2" not in blocks["sweep"]
    assert "| prompt of 5 vectors | 30 | 16 | 12.5 | 80.0 | 8 |" in blocks["latency"]


def test_a_paper_s_finding_is_held_against_the_figures() -> None:
    random = [
        make_record(Cell(task="word-sentiment", method="prompt_tuning", init="random", k=K, seed=seed), 0.1)
        for seed in range(3)
    ]
    papers = render_blocks(Results([*RECORDS, *random]), PLANNED)["papers"].splitlines()
    (line,) = [line for line in papers if "random beginning" in line]

    assert "| +0.50 ±" in line
    assert line.endswith("| agree |")
    assert sum(line.endswith("| not measured |") for line in papers) == len(papers) - 3


@pytest.mark.parametrize(
    ("mean", "is_close", "verdict"),
    [
        (0.3, False, "agree"),
        (-0.3, False, "disagree"),
        (0.1, False, "not to be told apart"),
        (-0.1, True, "level, within noise"),
        (-0.3, True, "disagree: not level"),
    ],
)
def test_verdict_needs_twice_the_error(mean: float, is_close: bool, verdict: str) -> None:
    assert Difference(mean, 0.06, ["a"]).verdict(is_close=is_close) == verdict


def test_error_of_a_difference_counts_the_test_items_also_with_one_seed() -> None:
    better, worse = ([make_record(Cell(task="a", method=method), 0.5)] for method in ("none", "lora"))
    found = difference(Results([*better, *worse]), [("none", None, None)], [("lora", None, None)])

    assert found is not None
    assert found.mean == 0.0
    assert found.error == pytest.approx((2 * 0.25 / 100) ** 0.5)


def test_text_around_the_blocks_stays_and_blocks_are_replaced() -> None:
    page = PAGE.read_text(encoding="utf-8")
    first = fill_page(page, Results([NONE, *RECORDS]), PLANNED)
    second = fill_page(first, Results([]), PLANNED)

    assert "0.60 ± 0.10 (3)" in first
    assert "](images/tuning-methods.svg)" in first
    assert "](images/" not in second
    assert "0.60 ± 0.10 (3)" not in second
    assert fill_page(second, Results([NONE, *RECORDS]), PLANNED) == first
    assert first.startswith("# What prompts are worth\n")
    assert "## Beside the papers" in first


def test_a_page_without_one_of_the_blocks_is_refused() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("<!-- accuracy:", "<!-- acuracy:")
    with pytest.raises(PageError, match="acuracy"):
        fill_page(page, Results([]), PLANNED)


def test_plots_are_small_and_the_same_for_the_same_figures(tmp_path: Path) -> None:
    sweep = make_record(Cell(task="word-sentiment", method="prompt_tuning", init="vocab", k=1, seed=0))
    results = Results([NONE, *RECORDS, sweep])
    one, other = write_plots(tmp_path / "one", results), write_plots(tmp_path / "other", results)

    assert [path.name for path in one] == ["tuning-methods.svg", "tuning-parameters.svg", "tuning-k.svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert all(path.stat().st_size < 100_000 for path in one)
    assert write_plots(tmp_path / "none", Results([])) == []
