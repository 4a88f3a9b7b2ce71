"""docs/architectures.md: written from what was measured, and read back to be compared with a later measurement.

Differences are written as a power of ten that bounds twice what was measured, so that the page does not change with
the rounding of another machine.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import peft
import transformers

from tests.integration.decoders.architectures import ARCHITECTURES, ServedBy
from tests.integration.decoders.measure import BARE_NUM_TOKENS, MAX_TOKENS, PREFILL_CHUNK, Measured, measure
from tests.integration.isolation.comparison import TOLERANCE_NATS

KINDS = {"prompt_tuning": "prompt tuning", "p_tuning": "P-tuning", "prefix": "prefix tuning"}

_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf"

_COLUMNS: dict[ServedBy, Sequence[str]] = {
    "packed": ("architecture", "what is peculiar", "prompts compared (k)", "gate", "PEFT", "alone", "notes"),
    "dense": ("architecture", "what is peculiar", "prompts compared (k)", "gate", "PEFT", "alone", "notes"),
    "refused": ("architecture", "what is peculiar", "why"),
}

_HEAD = """\
# Architectures

{note}

Any decoder of transformers is put through a gate when it is loaded, and served in the first way that passes: packed,
else dense, else it is refused. This page lists what the tests try: a tiny random model of each in fp32, under
transformers {transformers} and PEFT {peft}, with what makes it differ kept. Windows are shorter than the rows, soft
caps bend, every kind of layer occurs.

Each serves a mixed batch: rows with each of the prompts named, and bare rows of {bare} tokens. Clients' tokens are
computed in chunks of {chunk} beside rows that decode; each row generates {new} more. Every row is compared with PEFT's
own model, one row at a time and with transformers' plainest attention (bare rows: with the model itself), and with the
same row as a batch of one whose tokens are computed whole.

- *gate*: the largest relative error of the check at load.
- *PEFT*, *alone*: the largest difference of a log-probability, in nats, over all tokens and their best alternatives.
  More than {tolerance}, or another greedy token, fails the test.

Not every checkpoint of a family has its peculiarities: the gate judges the one that is loaded.
"""

_INTRODUCTIONS: dict[ServedBy, str] = {
    "packed": "All tokens of a step run as one sequence; each row reads its own pages and no other's.",
    "dense": (
        "These compute attention by themselves, or mask it in a way that attention is not told. Decoding rows run as\n"
        "one padded batch, chunks of prompts one by one: slower, with the same isolation. The notes say why; so does\n"
        "the log when such a model is loaded."
    ),
    "refused": "Loading one of these ends with an error that says what was tried and how it failed.",
}


def measure_all(names: Iterable[str] = tuple(ARCHITECTURES)) -> list[Measured]:
    """Measure each architecture in a folder of its own, gone afterwards. Takes about a second each."""
    found = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(ARCHITECTURES[name], Path(folder)))
    return found


def render(measured: Sequence[Measured], note: str) -> str:
    """The whole page. `note` says that it is generated."""
    text = _HEAD.format(
        note=note,
        transformers=transformers.__version__,
        peft=peft.__version__,
        bare=", ".join(str(num_tokens) for num_tokens in BARE_NUM_TOKENS),
        chunk=PREFILL_CHUNK,
        new=MAX_TOKENS,
        tolerance=_power(TOLERANCE_NATS),
    )
    for path, introduction in _INTRODUCTIONS.items():
        columns = _COLUMNS[path]
        lines = ["", f"## {path.capitalize()}", "", introduction, "", _line(columns), "|" + "---|" * len(columns)]
        lines += [row_of(found) for found in measured if found.path == path]
        text += "\n".join(lines) + "\n"
    return text


def row_of(measured: Measured) -> str:
    """The architecture's line of the page."""
    architecture = measured.architecture
    start = (f"`{architecture.name}`", architecture.peculiar)
    if measured.path == "refused":
        return _line((*start, _refusal(measured)))
    checked = "; ".join(f"{KINDS[kind]} {', '.join(map(str, ks))}" for kind, ks in measured.checked.items())
    bounds = [_bound(value) for value in (measured.gate_error, measured.from_peft, measured.from_alone)]
    return _line((*start, checked or "none", *bounds, _notes(measured)))


def rows_of(page: str) -> dict[str, str]:
    """Name → line of every architecture on the page, in its order."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", page, re.MULTILINE)}


def frame_of(page: str) -> str:
    """The page without its architectures."""
    return re.sub(r"^\| `[^`]+` \|.*\n", "", page, flags=re.MULTILINE)


def is_current(row: str, measured: Measured) -> bool:
    """Whether the page's line still holds: differences are within its bounds, all else is what would be written."""
    if measured.path != "refused":
        bounds = [float(bound) for bound in re.findall(r"≤ (\S+)", row)]
        values = (measured.gate_error, measured.from_peft, measured.from_alone)
        if len(bounds) != len(values) or any(not value <= bound for value, bound in zip(values, bounds, strict=True)):
            return False
    return re.sub(r"≤ \S+", "≤", row) == re.sub(r"≤ \S+", "≤", row_of(measured))


def _notes(measured: Measured) -> str:
    notes = [] if measured.packed_reason is None else [_without_measurements(measured.packed_reason)]
    refused: dict[str, list[str]] = {}
    for kind, reason in measured.refused.items():
        refused.setdefault(reason, []).append(KINDS[kind])
    notes += [f"no {' or '.join(kinds)}: {_without_measurements(reason)}" for reason, kinds in refused.items()]
    return "; ".join(notes)


def _refusal(measured: Measured) -> str:
    reason = (measured.refusal or "").split(" is refused. ")[-1]
    return _without_measurements(reason)


def _without_measurements(reason: str) -> str:
    """Without the numbers of one run, and on one line."""
    reason = re.sub(rf" by (?:{_NUMBER})(?: \(allowed (?:{_NUMBER})\))?", "", reason)
    return " ".join(reason.split())


def _bound(value: float) -> str:
    return f"≤ {_power(10.0 ** math.ceil(math.log10(max(2 * value, 1e-7))))}"


def _power(value: float) -> str:
    return f"1e{round(math.log10(value))}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
