"""Random comings and goings of rows in a pool that is always short: every row reads its own, no page is lost."""

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.pages import FREE
from server.engine.row import Row
from tests.unit.engine.row_memory_bench import PREFIX_TOKENS, Bench, pages_of


class Comings(RuleBasedStateMachine):
    """Rows of two tenants with few texts come, grow, give way and end, in a pool that is always short."""

    @initialize(row_pages=st.integers(4, 14))
    def start(self, row_pages: int) -> None:
        self.bench = Bench(row_pages=row_pages)
        self.running: list[Row] = []
        self.preempted: list[Row] = []

    @rule(
        beginning=st.integers(0, 1),
        num_same=st.sampled_from([3, 16, 30, 32]),
        num_other=st.integers(1, 12),
        tenant=st.sampled_from(["a", "a", "b"]),
        prompt=st.sampled_from([None, *PREFIX_TOKENS]),
    )
    def admit(self, beginning: int, num_same: int, num_other: int, tenant: str, prompt: str | None) -> None:
        row = self.bench.row([beginning] * num_same + [9] * num_other, tenant=tenant, prompt=prompt)
        if self.bench.try_admit(row):
            self.running.append(row)
        else:
            assert row.pages is None

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 20), new_token=st.integers(0, 1))
    def step(self, data: st.DataObject, num_tokens: int, new_token: int) -> None:
        row = data.draw(st.sampled_from(self.running))
        num_tokens = min(num_tokens, row.num_uncomputed)
        if row.num_generated < 40 and self.bench.memory.extend(row, num_tokens):
            self.bench.compute(row, num_tokens)
            if not row.num_uncomputed:
                row.token_ids.append(new_token)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        self.bench.memory.keep_text(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        row = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if not fails:
            self.bench.memory.keep_text(row)
        self.bench.memory.release(row)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        row = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.bench.end(row)
        row.num_computed = 0
        row.num_preemptions += 1
        self.preempted.append(row)

    @precondition(lambda self: self.preempted)
    @rule()
    def admit_again(self) -> None:
        if self.bench.try_admit(self.preempted[0]):
            self.running.append(self.preempted.pop(0))

    @rule(prompt=st.sampled_from(list(PREFIX_TOKENS)))
    def forget(self, prompt: str) -> None:
        self.bench.memory.forget_prompt(f"key-{prompt}")

    @invariant()
    def every_row_reads_its_own_and_no_page_is_lost(self) -> None:
        bench = self.bench
        bench.check()
        for row in self.running:
            bench.assert_holds_its_own(row)
            assert 0 <= row.num_computed < len(row.token_ids)
        is_free = torch.from_numpy(bench.pool.ledger.owner == FREE)
        assert bool(bench.pool.key_pages[0][is_free].isnan().all()), "a page was freed without being poisoned"
        held = {page for row in self.running for page in pages_of(row).held.tolist()}
        assert bench.pool.num_row_pages == len(held) + bench.memory.texts.num_evictable

    def teardown(self) -> None:
        for row in self.running:
            self.bench.memory.release(row)
        texts = self.bench.memory.texts
        assert self.bench.pool.num_row_pages == texts.num_pages
        texts.evict(texts.num_pages)
        assert self.bench.pool.num_row_pages == 0, "a page was lost"


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
