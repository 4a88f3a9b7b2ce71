"""The scheduler on a machine that is a formula: steps take `base + rows + further tokens` of virtual time.

What tenants wait for is then a matter of the rules alone, and the same in every run.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.row import Row
from server.engine.scheduler import StepForm
from tests.unit.engine.scheduling import Memory, end, is_finished, make_row, make_scheduler, take


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and by what share of that they vary from step to step."""

    base_s: float
    per_row_s: float
    per_token_s: float
    noise: float = 0.05

    def of(self, num_rows: int, num_tokens: int) -> float:
        return self.base_s + self.per_row_s * num_rows + self.per_token_s * (num_tokens - num_rows)


@dataclass
class Client:
    """Keeps so many requests in the engine. One that ends is followed by the next after up to `think_s`."""

    tenant: str
    num_tokens: int
    num_new: int
    num_requests: int = 1
    think_s: float = 0.0
    num_tokens_made: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


class Simulation:
    """Steps of one engine. `now_s` is the virtual time, and `forms` counts the steps by their form."""

    def __init__(self, cost: Cost, *, max_rows: int = 64, max_step_tokens: int = 512, prefill_chunk: int = 256) -> None:
        self.now_s = 0.0
        self.forms: Counter[StepForm] = Counter()
        self.max_left_out = 0
        self.scheduler = make_scheduler(
            memory := Memory(num_pages=20_000),
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            prefill_chunk=prefill_chunk,
            quantum=64,
            clock=lambda: self.now_s,
        )
        self.memory = memory
        self._cost = cost
        self._random = random.Random(0)
        self._serial = 0
        self._arrivals: list[tuple[float, Client]] = []
        self._rows: dict[Row, tuple[Client, float]] = {}
        self._num_left_out: Counter[Row] = Counter()

    def add(self, client: Client) -> None:
        self._arrivals += [(self.now_s, client)] * client.num_requests

    def drop(self, client: Client) -> None:
        """The client leaves, and its requests are cancelled."""
        self._arrivals = [item for item in self._arrivals if item[1] is not client]
        for row in [row for row, (owner, _) in self._rows.items() if owner is client]:
            del self._rows[row]
            end(self.scheduler, self.memory, row)

    def run(self, client: Client, num_answers: int) -> None:
        """Until the client has so many answers more."""
        goal = len(client.whole_s) + num_answers
        while len(client.whole_s) < goal:
            self.step()

    def run_for(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.step()

    def step(self) -> None:
        self._take_arrivals()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            self.now_s = min(arrived_s for arrived_s, _ in self._arrivals)
            return
        self.forms[self.scheduler.form] += 1
        self._count_left_out([item.row for item in scheduled])
        num_tokens = sum(item.num_tokens for item in scheduled)
        took_s = self._cost.of(len(scheduled), num_tokens)
        took_s *= 1 + self._cost.noise * self._random.uniform(-1, 1)
        self.now_s += took_s
        self.scheduler.step_times.add(len(scheduled), num_tokens, took_s)
        yielding = [item.row for item in scheduled if item.yields_token]
        take(scheduled)
        for row in yielding:
            client, arrived_s = self._rows[row]
            client.num_tokens_made += 1
            if row.num_generated == 1:
                client.first_s.append(self.now_s - arrived_s)
            if is_finished(row):
                client.whole_s.append(self.now_s - arrived_s)
                self._arrivals.append((self.now_s + client.think_s * self._random.random(), client))
                del self._rows[row], self._num_left_out[row]
                end(self.scheduler, self.memory, row)

    def _take_arrivals(self) -> None:
        due = [item for item in self._arrivals if item[0] <= self.now_s]
        self._arrivals = [item for item in self._arrivals if item[0] > self.now_s]
        for arrived_s, client in due:
            self._serial += 1
            row = make_row(self._serial, tenant=client.tenant, num_tokens=client.num_tokens, num_new=client.num_new)
            self._rows[row] = client, arrived_s
            self.scheduler.add(row)

    def _count_left_out(self, taken: Sequence[Row]) -> None:
        """For how many ordinary steps in a row a running row has been left out, at most."""
        if self.scheduler.form is StepForm.EXPRESS:
            return
        for row in self.scheduler.running:
            self._num_left_out[row] += 1
        for row in taken:
            self._num_left_out[row] = 0
        self.max_left_out = max(self.max_left_out, max(self._num_left_out.values()))


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
