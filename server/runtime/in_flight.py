"""Requests whose rows are in the engine: each one's stream, meter and reservation, from its submission to its end.

Owns the way of a step's outputs to the streams that wait for them, and that whatever a request holds is given back
once, however it ends. Refuses to know HTTP and how rows are run. The event loop's thread alone uses it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from server.engine.request import RowOutput
from server.errors import PromptmuxError
from server.runtime.generation import Generation
from server.runtime.meter import RequestMeter
from server.runtime.receipts import RequestOrigin
from server.runtime.streams import RowStream
from server.tenancy.quotas import Reservation


@dataclass(frozen=True, slots=True)
class RunningGeneration:
    """A submitted request: read `stream` to its end or close it."""

    generation: Generation
    stream: RowStream
    meter: RequestMeter
    reservation: Reservation
    origin: RequestOrigin | None


class RequestsInFlight:
    """`on_end` is called once a request, when its last row has ended or its stream was closed."""

    def __init__(self, on_end: Callable[[RunningGeneration], None]) -> None:
        self._on_end = on_end
        self._of_row: dict[str, RunningGeneration] = {}

    def __len__(self) -> int:
        """Requests, not rows."""
        return len({id(running) for running in self._of_row.values()})

    def add(
        self,
        generation: Generation,
        reservation: Reservation,
        *,
        arrived_at_s: float,
        origin: RequestOrigin | None,
        cancel: Callable[[Iterable[str]], None],
    ) -> RunningGeneration:
        """A request whose rows the engine has taken just now. `cancel` ends rows whose stream is closed early."""
        row_ids = [row.row_id for row in generation.rows]
        stream = RowStream(row_ids, cancel=cancel, on_end=partial(self._end, row_ids))
        meter = RequestMeter(generation, arrived_at_s=arrived_at_s)
        running = RunningGeneration(generation, stream, meter, reservation, origin)
        for row_id in row_ids:
            self._of_row[row_id] = running
        return running

    def dispatch(self, outputs: Sequence[RowOutput]) -> None:
        """The outputs of a step; those of rows that are not here any more are dropped."""
        for output in outputs:
            running = self._of_row.get(output.row_id)
            if running is not None:
                running.meter.observe(output)
                running.stream.push(output)

    def fail(self, error: PromptmuxError) -> None:
        """Ends every row with `error`."""
        self.dispatch([RowOutput(row_id=row_id, error=error) for row_id in list(self._of_row)])

    def _end(self, row_ids: Sequence[str], _: RowStream) -> None:
        running = self._of_row[row_ids[0]]
        for row_id in row_ids:
            del self._of_row[row_id]
        self._on_end(running)
