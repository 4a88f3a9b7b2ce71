"""Who runs how many rows, who is entitled to a place at once, and the places that are kept for those who are.

Refuses to know pages, tokens and steps' contents; the scheduler decides what follows.
"""

from collections import Counter, deque
from collections.abc import Collection, Set

from server.engine.row import Row
from server.engine.waiting import WaitingRows

NUM_KEPT_STEPS = 64
"""For so many steps a place that was given up for an entitled row stays free for the next such row."""


class Shares:
    """The tenants as a step finds them.

    A tenant is small when all that it has is no more than its fair share of the places, else large. It is entitled to a
    place at once when it is small, or when nothing of it runs, nor has run in the step before. Without that look back,
    a tenant with a backlog of rows of one token would find nothing of its own running every other step, and push others
    out each time.
    """

    def __init__(self, running: Collection[Row], waiting: WaitingRows, max_rows: int, recent: Set[str]) -> None:
        """`recent` are the tenants that had rows running when the step before was made."""
        self.num_running = Counter(row.request.tenant for row in running)
        self.tenants = {*self.num_running, *waiting.tenants}
        self.has_made_way = False
        self._recent = recent if running else frozenset()  # while nothing runs there is room for all
        share = max(1, max_rows // max(1, len(self.tenants)))
        num_rows = {t: self.num_running[t] + waiting.num_rows_of(t) for t in self.tenants}
        self.small = {t for t, number in num_rows.items() if number <= share}
        self.large = self.tenants - self.small
        # Those that were small beside one more tenant too, should they be alone.
        self.calm = {t for t in self.small if num_rows[t] <= max(1, max_rows // 2)}

    @property
    def entitled(self) -> set[str]:
        return {tenant for tenant in self.tenants if self.is_entitled(tenant)}

    def is_entitled(self, tenant: str) -> bool:
        return tenant in self.small or not (self.num_running[tenant] or tenant in self._recent)

    def can_make_way_for(self, tenant: str) -> bool:
        """Whether the tenant is entitled to a place, and another would still run no fewer rows than it."""
        return self.is_entitled(tenant) and self._largest[0] >= self.num_running[tenant] + 2

    def make_way(self) -> str:
        """The tenant that gives up one of its places."""
        tenant = self._largest[1]
        self.num_running[tenant] -= 1
        self.has_made_way = True
        return tenant

    @property
    def _largest(self) -> tuple[int, str]:
        """How many rows the tenant runs that runs most of those not entitled to a place, and which it is."""
        return max(((n, t) for t, n in self.num_running.items() if not self.is_entitled(t)), default=(0, ""))


class KeptPlaces:
    """Places that others gave up for entitled rows, kept free for the next ones when those have ended.

    Otherwise the row that gave way would come back at once, compute its tokens again, and give way to the next.
    """

    def __init__(self) -> None:
        self._takers: set[Row] = set()
        self._kept_until: deque[int] = deque()  # step numbers, ascending
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self._kept_until)

    def begin_step(self) -> None:
        self._num_steps += 1
        while self._kept_until and self._kept_until[0] < self._num_steps:
            self._kept_until.popleft()

    def take(self, row: Row, *, is_given_up: bool) -> None:
        """An entitled row has got a place: one that another has just given up, or one that is kept, if there is any."""
        if not is_given_up:
            if not self._kept_until:
                return
            self._kept_until.popleft()
        self._takers.add(row)

    def end(self, row: Row) -> None:
        """A row has ended."""
        if row in self._takers:
            self._takers.remove(row)
            self._kept_until.append(self._num_steps + NUM_KEPT_STEPS)

    def clear(self) -> None:
        self._takers.clear()
        self._kept_until.clear()
