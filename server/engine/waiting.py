"""Rows that wait, and whose turn it is: deficit round robin over tenants, counted in tokens.

Each tenant has a balance. When every waiting tenant has used its own up, a round begins that gives each the same
quantum (Shreedhar and Varghese 1996), and they are served in turn while theirs is positive. What a row will cost is not
known when it is admitted: `max_tokens` is only a bound, and a charge for it would make a tenant wait for tokens that it
never gets. So a token is charged when a step computes it, and a balance may go below zero; that debt is paid by the
rounds to come. Tokens that a preempted row computes again are not charged: it gave way for others.

A tenant that comes back is put level with the best of those present, unless it is behind them (the lift of Sheng et
al. 2024, "Fairness in serving large language models"): who was away has no claim on what others used meanwhile, and
going away pays no debt. So the tokens that two tenants get while both wait differ by no more than the quantum and what
one step computes, however many rows either has.

Within a tenant, a row goes before those that arrived up to `PRIORITY_STEP` rows earlier for each step of priority that
it is sooner. Among rows that wait together that is strict; but none is overtaken for ever.

Refuses to know pages, prefixes and budgets.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterator

from server.engine.row import Row

PRIORITY_STEP = 4096
DEFAULT_QUANTUM = 64
# Tenants that are away and whose balance is remembered.
MAX_ABSENT = 4096


def rank(row: Row) -> int:
    """The place of a row among those of its tenant: lowest first."""
    return row.serial + PRIORITY_STEP * row.request.priority


class WaitingRows:
    """Waiting rows by tenant, and every tenant's balance. Only the engine thread touches it."""

    def __init__(self, quantum: int = DEFAULT_QUANTUM) -> None:
        self._quantum = quantum
        self._queues: OrderedDict[str, list[Row]] = OrderedDict()
        self._balances: OrderedDict[str, int] = OrderedDict()  # those that came last at the end
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order in which they would be admitted if nothing held any of them back."""
        return self.of_tenants(self._queues)

    @property
    def tenants(self) -> Collection[str]:
        """Tenants with a waiting row."""
        return self._queues.keys()

    def num_rows_of(self, tenant: str) -> int:
        return len(self._queues.get(tenant, ()))

    def of_tenants(self, tenants: Collection[str]) -> Iterator[Row]:
        """The rows of these tenants in turn. Lazy; rows may be removed meanwhile."""
        queues = {tenant: iter(tuple(rows)) for tenant, rows in self._queues.items() if tenant in tenants}
        balances = {tenant: self._balances[tenant] for tenant in queues}
        while queues:
            # Several rounds at once, where one would leave every tenant below zero.
            num_rounds = min(-balance // self._quantum + 1 for balance in balances.values())
            for tenant in list(queues):
                balances[tenant] += max(0, num_rounds) * self._quantum
                while balances[tenant] > 0:
                    row = next(queues[tenant], None)
                    if row is None:
                        del queues[tenant], balances[tenant]
                        break
                    balances[tenant] -= row.num_uncomputed
                    yield row

    def add(self, row: Row, present: Collection[str] = ()) -> None:
        """`present` are tenants with running rows; with those that wait they are the ones to be level with."""
        tenant = row.request.tenant
        if tenant not in self._queues:
            self._queues[tenant] = []
            if tenant not in present:
                self._enter(tenant, present)
        insort(self._queues[tenant], row, key=rank)
        self._num_rows += 1

    def remove(self, row: Row) -> None:
        tenant = row.request.tenant
        self._queues[tenant].remove(row)
        self._num_rows -= 1
        if not self._queues[tenant]:
            del self._queues[tenant]

    def charge(self, tenant: str, num_tokens: int) -> None:
        """A step computes so many tokens of the tenant's for the first time."""
        self._balances[tenant] = self._balances.get(tenant, 0) - num_tokens

    def _enter(self, tenant: str, present: Collection[str]) -> None:
        others = [self._balances[other] for other in {*self._queues, *present} - {tenant} if other in self._balances]
        balance = self._balances.pop(tenant, max(others, default=0))
        self._balances[tenant] = min(balance, max(others, default=balance))
        absent = len(self._balances) - MAX_ABSENT
        if absent > 0:
            for name in [n for n in self._balances if n not in self._queues and n not in present][:absent]:
                del self._balances[name]
