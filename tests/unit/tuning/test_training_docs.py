"""docs/training.md names every method, configuration field, file, metric and warning, and the limits of the code."""

import re
from pathlib import Path
from typing import get_args

from tuning import cautions, examples, reports
from tuning.config import INITS, LEARNING_RATES, Method, TrainConfig
from tuning.evaluation import Evaluation
from tuning.plans import TEST_SUFFIX, VALIDATION_SUFFIX
from tuning.prefixes import CONFIG_FILE, PROMPT_FILE
from tuning.provenance import HELD_OUT_FILE, RECORD_FILE
from tuning.records import HistoryPoint
from tuning.run import STATE_FOLDER

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def test_each_method_has_a_row_with_its_usual_beginning_and_learning_rate() -> None:
    for method in get_args(Method):
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{method}` ("))
        assert f"| `{INITS[method][0]}`, {LEARNING_RATES[method]} |" in row


def test_every_key_of_a_tasks_file_is_named() -> None:
    (keys,) = re.findall(r"The keys are (.+?)\. A task", PAGE, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", keys))
    assert named == set(TrainConfig.model_fields) | {"template", "validation_share", "test_share"}


def test_every_file_that_is_read_or_written_is_named() -> None:
    files = (
        CONFIG_FILE,
        PROMPT_FILE,
        RECORD_FILE,
        HELD_OUT_FILE,
        reports.METRICS_FILE,
        reports.CURVES_FILE,
        STATE_FOLDER,
    )
    for name in (*files, f"NAME{VALIDATION_SUFFIX}", f"NAME{TEST_SUFFIX}", "NAME.toml"):
        assert name in PAGE, name


def test_every_field_of_the_metrics_is_named() -> None:
    fields = {*HistoryPoint.__dataclass_fields__, *Evaluation.__dataclass_fields__} - {"answers"}
    for name in fields | {"kind", "of", "examples"}:
        assert f"`{name}`" in PAGE, name


def test_every_warning_has_a_row() -> None:
    source = Path(str(cautions.__file__)).read_text(encoding="utf-8")
    codes = set(re.findall(r'"(\w+): ', source)) | set(re.findall(r'f"(\w+): ', source))
    assert codes >= {"structured_output", "long_reasoning", "few_examples"}
    for code in codes | {"small_backbone", "few_virtual_tokens"}:
        assert f"| `{code}` |" in PAGE, code


def test_limits_are_those_of_the_code() -> None:
    assert (examples.MAX_LINE_BYTES, examples.MAX_EXAMPLES, examples.MAX_TEXT_CHARS) == (4 << 20, 10**6, 10**6)
    assert (examples.MAX_LABELS, examples.MAX_LABEL_CHARS, examples.MAX_PROBLEMS) == (1000, 200, 20)
    assert "4 MiB a line, a million examples a file, a million characters a text, 1,000 labels of 200" in PAGE
