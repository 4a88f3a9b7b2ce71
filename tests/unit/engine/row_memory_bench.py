"""A memory of rows that are computed by hand, column by column.

No model runs: a column's numbers are a function of all that a model would have made them from (`number_of`), so that a
page which is shared with the wrong row, or was written by another, shows in what is read.
"""

from dataclasses import dataclass, field

import torch

from server.engine.isolation import Claim, check_plan
from server.engine.kv import KeysValues, KvPool, LayerShape
from server.engine.pages import PAGE_SIZE, content_of_prefix
from server.engine.plan import build_plan
from server.engine.prefix import Prefix
from server.engine.request import RowRequest, SamplingParams
from server.engine.row import Row
from server.engine.row_memory import RowMemory
from server.engine.row_pages import RowPages
from server.engine.scheduler import ScheduledRow
from server.engine.step import claim, plan_entry
from server.engine.text import TextStream
from tests.fakes import ByteTokenizer
from tests.unit.engine.prompts import make_ref

PREFIX_TOKENS = {"tail": 5, "full": 2 * PAGE_SIZE, "both": PAGE_SIZE + 7, "like full": 2 * PAGE_SIZE}


def number_of(*parts: object) -> float:
    """A number that only the same parts give, small enough to be exact in fp32."""
    return float(hash(parts) % 2**20)


@dataclass
class Bench:
    """A memory whose rows are computed by hand. Prompts by name, all of them on the device."""

    row_pages: int = 12
    keeps_texts: bool = True
    reserves_all: bool = False
    next_serial: int = 0
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = KvPool(
            [LayerShape(1, 1, 1)], row_pages=self.row_pages, prefix_pages=5, dtype=torch.float32,
            device=torch.device("cpu"), poison_freed=True,
        )  # fmt: skip
        self.memory = RowMemory(self.pool, keeps_texts=self.keeps_texts, reserves_all=self.reserves_all)
        for uid, (name, k) in enumerate(PREFIX_TOKENS.items(), start=1):
            self.prefixes[name] = self._make_prefix(name, k, uid)

    def row(self, token_ids: list[int], *, tenant: str = "a", prompt: str | None = None, **sampling: int | None) -> Row:
        ref = make_ref(prompt, k=PREFIX_TOKENS[prompt]) if prompt is not None else None
        self.next_serial += 1
        request = RowRequest(
            row_id=f"row-{self.next_serial}",
            tenant=tenant,
            token_ids=tuple(token_ids),
            prompt=ref,
            sampling=SamplingParams(**({"max_tokens": 40} | sampling)),  # type: ignore[arg-type]
        )
        text = TextStream(ByteTokenizer(), context=request.token_ids, stop=(), skip_special_tokens=True)
        self.rows.append(Row(request=request, serial=self.next_serial, arrived_at_s=0.0, text=text))
        return self.rows[-1]

    def try_admit(self, row: Row) -> bool:
        prompt = row.request.prompt
        row.prefix = self.prefixes[prompt.prefix_key.removeprefix("key-")] if prompt is not None else None
        return self.memory.admit(row, row.prefix)

    def admitted(self, token_ids: list[int], **fields: str | int | None) -> Row:
        row = self.row(token_ids, **fields)  # type: ignore[arg-type]
        assert self.try_admit(row)
        return row

    def compute(self, row: Row, num_tokens: int | None = None) -> None:
        """A step of this row alone, by way of its plan and its check."""
        item = ScheduledRow(row, num_tokens if num_tokens is not None else row.num_uncomputed)
        plan, _ = build_plan([plan_entry(item)])
        assert check_plan(plan, [self.claim(item)], self.pool.ledger) == []
        expected = self.expected(row, row.next_column + item.num_tokens)
        for slot, position in zip(plan.write_slots.tolist(), plan.positions.tolist(), strict=True):
            for tensor in (self.pool.key_pages[0], self.pool.value_pages[0]):
                tensor[slot // PAGE_SIZE, 0, slot % PAGE_SIZE] = expected[position]
        row.num_computed += item.num_tokens

    def claim(self, item: ScheduledRow) -> Claim:
        if item.row.prefix is not None:
            item.row.prefix.num_users = 1
        return claim(item)

    def expected(self, row: Row, num_columns: int) -> list[float]:
        """What the row's first columns hold, by its request and tokens alone."""
        prompt = row.request.prompt
        name = prompt.prefix_key if prompt is not None else None
        k = row.num_virtual_tokens
        prefix = [number_of(name, column) for column in range(k)]
        tokens = [
            number_of(row.request.tenant, name, tuple(row.token_ids[: i + 1])) for i in range(max(0, num_columns - k))
        ]
        return [*prefix, *tokens]

    def assert_holds_its_own(self, row: Row) -> None:
        pages = pages_of(row)
        found = self.pool.read(pages.numbers, row.next_column).by_layer()
        expected = torch.tensor(self.expected(row, row.next_column)).reshape(1, -1, 1)
        assert torch.equal(found.keys[0], expected)
        assert torch.equal(found.values[0], expected)

    def check(self) -> None:
        self.memory.check_invariants(self.rows)

    def end(self, row: Row) -> None:
        self.memory.keep_text(row)
        self.memory.release(row)

    def _make_prefix(self, name: str, k: int, uid: int) -> Prefix:
        key, num_full = f"key-{name}", k // PAGE_SIZE
        numbers = torch.tensor([number_of(key, column) for column in range(k)]).reshape(1, k, 1)
        columns = self.pool.stack(KeysValues((numbers,), (numbers.clone(),)))
        self.next_serial += 1
        pages = self.pool.allocate_prefix(self.next_serial, num_full)
        assert pages is not None
        self.pool.write(pages, columns.columns(0, num_full * PAGE_SIZE))
        for i, page in enumerate(pages.tolist()):
            self.pool.ledger.share(page, self.next_serial, content_of_prefix(key, i))
        tail = columns.columns(num_full * PAGE_SIZE, k).clone() if k % PAGE_SIZE else None
        return Prefix(uid, key, f"digest-{name}", pages, tail, columns.num_bytes, num_users=1)


def pages_of(row: Row) -> RowPages:
    assert row.pages is not None
    return row.pages


def text(num_tokens: int, first: int = 0) -> list[int]:
    return [(first + i) % 100 for i in range(num_tokens)]
