"""Every decoder that is tried gives each row of a mixed batch what PEFT gives it, or says why it is not served."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.decoders.architectures import ARCHITECTURES
from tests.integration.decoders.measure import KINDS_OF_PROMPTS, Measured, measure
from tests.integration.decoders.page import frame_of, is_current, render, row_of, rows_of

PAGE = Path(__file__).resolve().parents[3] / "docs/architectures.md"
REMEDY = "run `python docs/generate.py architectures.md`"
SERVED = [name for name, architecture in ARCHITECTURES.items() if architecture.path != "refused"]

MeasuredOf = Callable[[str], Measured]


@pytest.fixture(scope="session")
def measured_of(tmp_path_factory: pytest.TempPathFactory) -> MeasuredOf:
    """An architecture's measurement, made once a run."""
    found: dict[str, Measured] = {}

    def of(name: str) -> Measured:
        if name not in found:
            found[name] = measure(ARCHITECTURES[name], tmp_path_factory.mktemp("decoder"))
        return found[name]

    return of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_served_in_the_declared_way(name: str, measured_of: MeasuredOf) -> None:
    measured = measured_of(name)
    assert measured.path == ARCHITECTURES[name].path, measured.packed_reason or measured.refusal


@pytest.mark.parametrize("name", SERVED)
def test_each_row_of_a_mixed_batch_equals_peft_and_its_batch_of_one(name: str, measured_of: MeasuredOf) -> None:
    measured = measured_of(name)
    assert measured.failures == []
    assert set(measured.checked) | set(measured.refused) == KINDS_OF_PROMPTS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_page_says_what_is_measured(name: str, measured_of: MeasuredOf) -> None:
    row = rows_of(PAGE.read_text(encoding="utf-8")).get(name, "")
    measured = measured_of(name)
    assert is_current(row, measured), f"{REMEDY}\npage: {row}\nnow:  {row_of(measured)}"


def test_page_lists_every_architecture_in_order_and_no_other() -> None:
    page = PAGE.read_text(encoding="utf-8")
    note = page.splitlines()[2]
    assert list(rows_of(page)) == list(ARCHITECTURES), REMEDY
    assert frame_of(page) == render([], note), REMEDY


@pytest.mark.parametrize("kind", sorted(KINDS_OF_PROMPTS))
def test_prompts_of_nearly_every_architecture_are_compared(kind: str, measured_of: MeasuredOf) -> None:
    compared = [name for name in SERVED if kind in measured_of(name).checked]
    assert len(compared) > 0.85 * len(SERVED)
