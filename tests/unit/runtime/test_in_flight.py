"""Whatever becomes of requests, nothing of them stays: rows of a quota, streams, reservations. Over the echo engine."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_store.manifest import Quota
from server.engine.request import SamplingParams
from server.errors import NumericalError, PromptmuxError
from server.metrics import Metrics
from server.runtime.generation import GenerationSpec
from server.runtime.in_flight import RunningGeneration
from server.runtime.service import Runtime
from server.settings import Settings
from server.tenancy.keys import Caller
from tests.fakes import EchoServerParts

Ending = Literal["read", "close", "close_later", "error", "leave"]
TENANTS = ("acme", "other")
MAX_ROWS = 6
MAX_WAITING = 10

requests = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.integers(1, 4),
        st.integers(1, 2),
        st.integers(1, 5),
        st.sampled_from(["read", "close", "close_later", "error", "leave"]),
    ),
    max_size=14,
)


def make_spec(num_items: int, n: int, max_tokens: int, ending: Ending) -> GenerationSpec:
    return GenerationSpec(
        prompts=("bad" if ending == "error" else "x",) * num_items,
        references=("tiny/echo",) * num_items,
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
    )


async def end(running: RunningGeneration, ending: Ending) -> None:
    if ending == "close":
        running.stream.close()
    elif ending == "close_later":
        await running.stream.read(5)
        running.stream.close()
    elif ending != "leave":
        while not running.stream.is_finished:
            await running.stream.read(5)
        running.stream.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests, st.sampled_from(["stop", "crash", "hang", "drain"]), st.booleans())
def test_no_reservation_outlives_its_request(
    asked: list[tuple[str, int, int, int, Ending]], last: str, is_held: bool
) -> None:
    async def main(data_dir: Path) -> None:
        parts = EchoServerParts()
        runtime = Runtime(
            Settings(data_dir=data_dir, max_waiting_rows=MAX_WAITING),
            Metrics(),
            load_backbone=parts.load_backbone,
            make_engine=parts.make_engine,
        )
        await runtime.start()
        await asyncio.wait_for(runtime.wait_until_settled(), 10)
        assert parts.engine is not None
        parts.engine.errors["bad"] = NumericalError("NaN")
        runtime.store.set_quota(Quota(tenant="acme", max_running_rows=MAX_ROWS, tokens_per_minute=10**6))
        runtime.quotas.refresh("acme")
        if is_held:
            parts.engine.gate.clear()
        endings: list[asyncio.Task[None]] = []
        charged = dict.fromkeys(TENANTS, 0)
        for tenant, num_items, n, max_tokens, ending in asked:
            caller = Caller(tenant, frozenset({"infer"}))
            try:
                generation = await runtime.prepare(caller, make_spec(num_items, n, max_tokens, ending))
                running = runtime.submit(generation, arrived_at_s=0.0)
            except PromptmuxError:
                continue
            charged[tenant] += num_items * n
            if ending == "close":
                await end(running, ending)
            else:
                endings.append(asyncio.create_task(end(running, ending)))
            assert runtime.quotas.use_of("acme").rows <= MAX_ROWS
        if last == "crash":
            parts.engine.crash("boom")
        elif last == "hang":
            runtime._in_flight.fail(NumericalError("as the watcher does"))
        elif last == "drain":
            runtime.start_drain()
        parts.engine.gate.set()
        await asyncio.wait_for(asyncio.gather(*endings), 10)
        await runtime.stop()

        assert runtime.num_running_requests == 0
        uses = {tenant: runtime.quotas.use_of(tenant) for tenant in TENANTS}
        assert {tenant: use.rows for tenant, use in uses.items()} == dict.fromkeys(TENANTS, 0)
        # What was read, and at most what may have been made; what was refused costs nothing.
        assert uses["acme"].tokens <= charged["acme"] * 6

    with TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
