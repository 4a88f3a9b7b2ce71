"""The gather broken on purpose, in ways that the run-time check can see: the rows end with an error before the pass.

Each break touches two victims, or one, in the middle of a batch. The victims end with IsolationError and get no token
of that step; the metric counts them; the bystanders' outputs are what they are without any of it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from server.engine.pages import NO_CONTENT
from server.engine.plan import IntArray, PlanEntry, StepPlan, build_plan
from server.engine.row import Row
from server.errors import IsolationError
from tests.integration.isolation.driver import Case, EngineDriver
from tests.integration.isolation.world import World

VICTIMS = ("victim-a", "victim-b")
STRANGER = 10**9
"""The serial of a row that does not exist."""

Break = Callable[[StepPlan, int, int], None]


def swap(array: IntArray, one: int, other: int) -> None:
    assert array[one] != array[other], "the break would change nothing"
    array[one], array[other] = array[other], array[one]


def where(array: IntArray, value: int) -> int:
    return int((array == value).nonzero()[0][0])


def swap_tokens(name: str) -> Break:
    def apply(plan: StepPlan, a: int, b: int) -> None:
        swap(getattr(plan, name), int(plan.query_starts[a]), int(plan.query_starts[b]))

    return apply


def swap_rows(name: str) -> Break:
    def apply(plan: StepPlan, a: int, b: int) -> None:
        swap(getattr(plan, name), a, b)

    return apply


def swap_logits(name: str) -> Break:
    def apply(plan: StepPlan, a: int, b: int) -> None:
        swap(getattr(plan, name), where(plan.logits_entries, a), where(plan.logits_entries, b))

    return apply


def swap_page_tables(plan: StepPlan, a: int, b: int) -> None:
    table = plan.page_table
    assert (table[a] != table[b]).any(), "the break would change nothing"
    table[[a, b]] = table[[b, a]]


def swap_one_page(plan: StepPlan, a: int, b: int) -> None:
    """The first pages alone: the ones that hold the prompts' last columns."""
    table = plan.page_table
    table[[a, b], 0] = table[[b, a], 0]


def write_over_each_other(plan: StepPlan, a: int, b: int) -> None:
    one, other = (slice(int(plan.query_starts[entry]), int(plan.query_starts[entry + 1])) for entry in (a, b))
    both = [plan.write_slots[one].copy(), plan.write_slots[other].copy()]
    assert len(both[0]) == len(both[1])
    plan.write_slots[one], plan.write_slots[other] = both[1], both[0]


DECODE_BREAKS: dict[str, Break] = {
    "write slots": swap_tokens("write_slots"),
    "page tables": swap_page_tables,
    "one page": swap_one_page,
    "visible lengths": swap_rows("lengths"),
    "token ids": swap_tokens("token_ids"),
    "positions": swap_tokens("positions"),
    "logits' tokens": swap_logits("logits_tokens"),
    "logits' rows": swap_logits("logits_entries"),
}
OVERLAPPED_BREAKS = {name: breaks for name, breaks in DECODE_BREAKS.items() if name != "token ids"} | {
    "sources": swap_tokens("token_sources")
}
"""The host does not know the tokens: what can be exchanged is where the device finds them."""
PREFILL_BREAKS: dict[str, Break] = {
    "write slots": write_over_each_other,
    "page tables": swap_page_tables,
    "one page": swap_one_page,
    "visible lengths": swap_rows("lengths"),
    "token ids": swap_tokens("token_ids"),
    "positions": swap_tokens("positions"),
    "logits' tokens": swap_logits("logits_tokens"),
    "logits' rows": swap_logits("logits_entries"),
}


class Saboteur:
    """Stands in for `build_plan` and breaks one plan: the first in which both victims take part as wanted."""

    def __init__(self, driver: EngineDriver, breaks: Break, *, in_prefill: bool) -> None:
        self._driver = driver
        self._breaks = breaks
        self._in_prefill = in_prefill
        self.tokens_before: dict[str, list[int]] | None = None

    def __call__(self, entries: Sequence[PlanEntry]) -> tuple[StepPlan, list[int]]:
        plan, order = build_plan(entries)
        rows = [self._driver.row(row_id) for row_id in VICTIMS if row_id in self._driver.engine._rows]
        own = {int(row.pages.held[-1]) for row in rows if row.pages is not None}
        victims = [i for i, entry in enumerate(plan.entries) if int(entry.pages[-1]) in own]
        wanted = [i for i in victims if (plan.entries[i].num_tokens > 1) == self._in_prefill]
        # Tokens that happen to be equal could be exchanged without harm: then the next step will do.
        firsts = [plan.query_starts[i] for i in wanted]
        asked = {(int(plan.token_ids[first]), int(plan.token_sources[first])) for first in firsts}
        if self.tokens_before is None and len(wanted) == len(asked) == 2:
            self.tokens_before = {name: list(self._driver.results[name].token_ids) for name in VICTIMS}
            self._breaks(plan, *wanted)
        return plan, order


def make_cases(world: World) -> list[Case]:
    """Two victims among bystanders of every kind.

    The victims have different k, so that they are at different columns, but client tokens of equal number, so that
    exchanging their segments touches no third row.
    """
    rng = random.Random(21)
    victims = [
        world.case(rng, "victim-a", "prompt-tuning", 13, max_tokens=8),
        world.case(rng, "victim-b", "prefix", 13, max_tokens=8),
    ]
    bystanders = [world.case(rng, f"by-{name}", name, rng.randint(4, 20), max_tokens=8) for name in world.prompts]
    return [*bystanders[:3], victims[0], *bystanders[3:7], victims[1], *bystanders[7:]]


def assert_only_victims_ended(world: World, driver: EngineDriver, cases: list[Case], num_victims: int = 2) -> None:
    victims = VICTIMS[:num_victims]
    for name in victims:
        assert isinstance(driver.results[name].error, IsolationError), name
    assert driver.count("isolation_violations_total") == num_victims
    others = [case for case in cases if case.row_id not in victims]
    assert world.differences(others, driver.results) == []


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("name", DECODE_BREAKS)
def test_plan_broken_between_two_decoding_rows_ends_them_without_a_token(
    name: str, family: str, world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_broken_plan(world_of(family), DECODE_BREAKS[name], monkeypatch, in_prefill=False)


@pytest.mark.parametrize("name", OVERLAPPED_BREAKS)
def test_overlapped_plan_broken_between_two_decoding_rows_ends_them_without_a_token(
    name: str, world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_broken_plan(world_of("llama"), OVERLAPPED_BREAKS[name], monkeypatch, in_prefill=False, overlaps=True)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", PREFILL_BREAKS)
def test_plan_broken_between_two_prompts_being_computed_ends_them_without_a_token(
    name: str, family: str, world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_broken_plan(world_of(family), PREFILL_BREAKS[name], monkeypatch, in_prefill=True)


def run_broken_plan(
    world: World, breaks: Break, monkeypatch: pytest.MonkeyPatch, *, in_prefill: bool, overlaps: bool = False
) -> None:
    cases = make_cases(world)
    with world.driver(overlaps=overlaps) as driver:
        driver.make_resident()
        saboteur = Saboteur(driver, breaks, in_prefill=in_prefill)
        monkeypatch.setattr("server.engine.step.build_plan", saboteur)
        driver.run(cases)
        assert saboteur.tokens_before == {name: driver.results[name].token_ids for name in VICTIMS}
        assert_only_victims_ended(world, driver, cases)


def exchange(name: str) -> Callable[[Row, Row], None]:
    def apply(a: Row, b: Row) -> None:
        first, second = getattr(a, name), getattr(b, name)
        setattr(a, name, second)
        setattr(b, name, first)

    return apply


@pytest.mark.parametrize("attribute", ["prefix", "pages", "serial"])
def test_rows_that_exchange_their_claims_end_without_a_token(attribute: str, world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    with running(world, cases) as driver:
        rows = [driver.row(name) for name in VICTIMS]
        before = [list(row.token_ids) for row in rows]
        exchange(attribute)(*rows)
        driver.engine.run_once()
        assert [row.token_ids for row in rows] == before
        driver.finish()
        assert_only_victims_ended(world, driver, cases)


@pytest.mark.parametrize("owner", ["another row", "the same row again"])
def test_row_whose_page_was_given_away_ends_without_a_token(owner: str, world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    with running(world, cases) as driver:
        row, ledger = driver.row("victim-a"), driver.engine._pool.ledger
        assert row.pages is not None
        page, num_tokens = row.pages.held[-1:].copy(), len(row.token_ids)
        ledger.release(page, row.serial)
        taken = ledger.allocate(STRANGER if owner == "another row" else row.serial, 1)
        assert taken is not None
        assert taken.tolist() == page.tolist()
        driver.engine.run_once()
        assert len(row.token_ids) == num_tokens
        if owner == "another row":
            assert int(ledger.owner[page[0]]) == STRANGER, "ending the row took the page from its new owner"
            ledger.release(taken, STRANGER)
        driver.finish()
        assert_only_victims_ended(world, driver, cases, num_victims=1)


def test_row_whose_page_begins_with_another_prefix_ends_without_a_token(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    # A page that holds text for others as well answers by its content, not by this stamp.
    with running(world, cases, keeps_texts=False) as driver:
        row, other = (driver.row(name) for name in VICTIMS)
        num_tokens = len(row.token_ids)
        assert row.pages is not None
        assert other.prefix is not None
        first_own = row.pages.num_prefix_pages
        driver.engine._pool.ledger.tail_uid[row.pages.numbers[first_own]] = other.prefix.uid
        driver.engine.run_once()
        assert len(row.token_ids) == num_tokens
        driver.finish()
        assert_only_victims_ended(world, driver, cases, num_victims=1)


def test_row_whose_shared_page_holds_another_text_ends_without_a_token(world_of: Callable[[str], World]) -> None:
    """What is shared is checked by what it holds: a content id that the row works out from its own request."""
    world = world_of("llama")
    cases = make_cases(world)
    with running(world, cases) as driver:
        row, ledger = driver.row("victim-a"), driver.engine._pool.ledger
        num_tokens = len(row.token_ids)
        assert row.pages is not None
        shared = row.pages.held[row.pages.contents[row.pages.num_prefix_pages :] != NO_CONTENT]
        assert len(shared), "the row's text is offered to others once it is computed"
        ledger.content[shared[0]] += 1
        driver.engine.run_once()
        assert len(row.token_ids) == num_tokens
        ledger.content[shared[0]] -= 1
        driver.finish()
        assert_only_victims_ended(world, driver, cases, num_victims=1)


@contextmanager
def running(world: World, cases: list[Case], **config: bool) -> Iterator[EngineDriver]:
    """A driver whose rows have all been admitted and given two tokens."""
    with world.driver(**config) as driver:
        driver.make_resident()
        driver.submit(cases)
        driver.run_until(lambda: all(len(driver.results[case.row_id].token_ids) >= 2 for case in cases))
        yield driver


def test_unbroken_plan_ends_nobody(world_of: Callable[[str], World], monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of("llama")
    cases = make_cases(world)
    with world.driver() as driver:
        driver.make_resident()
        saboteur = Saboteur(driver, lambda plan, a, b: None, in_prefill=False)
        monkeypatch.setattr("server.engine.step.build_plan", saboteur)
        results = driver.run(cases)
        assert saboteur.tokens_before is not None
        assert driver.count("isolation_violations_total") == 0
        assert driver.count("isolation_checks_total") >= sum(case.max_tokens for case in cases)
    assert world.differences(cases, results) == []
