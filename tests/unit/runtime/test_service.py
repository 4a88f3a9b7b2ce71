"""The runtime over the echo engine, without HTTP: how outputs reach the loop, and what a request may ask for."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prompt_store.manifest import Canary
from server.engine.request import PromptRef, SamplingParams
from server.errors import InvalidRequestError, LoadingError, TaskNotFoundError
from server.metrics import Metrics
from server.runtime.generation import GenerationSpec
from server.runtime.service import Runtime
from server.runtime.tasks import PromptUpload
from server.settings import Settings
from server.tenancy.keys import LOCAL_CALLER
from tests.fakes import EchoServerParts, EchoStatus, make_prompt_config, make_prompt_file


def run(data_dir: Path, body: Callable[[Runtime, EchoServerParts], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        parts = EchoServerParts()
        runtime = Runtime(
            Settings(data_dir=data_dir, **settings),
            Metrics(),
            load_backbone=parts.load_backbone,
            make_engine=parts.make_engine,
        )
        with pytest.raises(LoadingError):
            runtime.check_ready()
        await runtime.start()
        await asyncio.wait_for(runtime.wait_until_settled(), 10)
        try:
            await body(runtime, parts)
        finally:
            await runtime.stop()
            await runtime.stop()

    asyncio.run(main())


def make_spec(num_items: int = 1, *, reference: str = "tiny/echo", n: int = 1, max_tokens: int = 1) -> GenerationSpec:
    return GenerationSpec(
        prompts=("x",) * num_items,
        references=(reference,) * num_items,
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
    )


def test_a_step_costs_the_loop_one_call_however_many_rows_it_has(tmp_path: Path) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        assert parts.engine is not None
        loop = asyncio.get_running_loop()
        calls: list[str] = []
        original = loop.call_soon_threadsafe

        def counted(*arguments: Any, **keywords: Any) -> asyncio.Handle:
            calls.append(threading.current_thread().name)
            return original(*arguments, **keywords)

        generation = await runtime.prepare(LOCAL_CALLER, make_spec(50, max_tokens=3))
        parts.engine.gate.clear()
        running = runtime.submit(generation, arrived_at_s=loop.time())
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        parts.engine.gate.set()
        while not running.stream.is_finished:
            await running.stream.read(5)

        assert calls.count("echo-engine") == 3
        assert running.meter.completion_tokens == 150
        assert running.meter.finish_reason == "length"

    run(tmp_path, body)


def test_every_request_leaves_nothing_behind(tmp_path: Path) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        for closes_early in (False, True):
            generation = await runtime.prepare(LOCAL_CALLER, make_spec(4, max_tokens=50))
            running = runtime.submit(generation, arrived_at_s=0.0)
            assert runtime.num_running_requests == 1
            while not closes_early and not running.stream.is_finished:
                await running.stream.read(5)
            running.stream.close()
            assert runtime.num_running_requests == 0

    run(tmp_path, body)


@pytest.mark.parametrize(("spec", "param"), [(make_spec(4, n=3, max_tokens=10), "max_tokens"), (make_spec(11), "n")])
def test_request_over_its_budget_is_refused(tmp_path: Path, spec: GenerationSpec, param: str) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            await runtime.prepare(LOCAL_CALLER, spec)
        assert refused.value.param == param
        await runtime.prepare(LOCAL_CALLER, make_spec(10, max_tokens=10))

    run(tmp_path, body, max_request_tokens=100, max_waiting_rows=10)


def test_watcher_of_the_engine_outlives_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.runtime.watch.WATCH_INTERVAL_S", 0.001)

    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        assert parts.engine is not None
        loop, has_failed = asyncio.get_running_loop(), asyncio.Event()
        calls = 0

        def failing() -> EchoStatus:
            nonlocal calls
            calls += 1
            if calls == 3:
                loop.call_soon(has_failed.set)
            raise RuntimeError("no status")

        sound_status = parts.engine.status
        parts.engine.status = failing  # type: ignore[method-assign]
        await asyncio.wait_for(has_failed.wait(), 5)
        parts.engine.status = sound_status  # type: ignore[method-assign]
        assert runtime.state == "ready"

        parts.engine.crash("boom")
        await asyncio.wait_for(runtime.wait_until_engine_failed(), 5)
        assert (runtime.state, runtime.failure) == ("failed", "boom")

    run(tmp_path, body)


def test_pins_reach_the_engine_in_the_order_in_which_they_were_read(tmp_path: Path) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        assert parts.engine is not None
        tasks, engine = runtime.parts.tasks, parts.engine
        for task, value in (("a", 0.1), ("b", 0.2)):
            upload = PromptUpload(task=task, file=make_prompt_file(value), config=make_prompt_config())
            await runtime.call(tasks.upload, LOCAL_CALLER, upload)
        is_pinning, has_other_come = threading.Event(), threading.Event()
        post = engine.pin

        def pin(refs: Sequence[PromptRef]) -> None:
            if not is_pinning.is_set():
                # The first one is held up between its reading and its posting for as long as the other may need.
                is_pinning.set()
                has_other_come.wait(0.5)
                post(refs)
            else:
                post(refs)
                has_other_come.set()

        engine.pin = pin  # type: ignore[method-assign]
        change = partial(tasks.update_task, LOCAL_CALLER, active_version=None, expected_version=None, pinned=True)
        first = asyncio.ensure_future(runtime.call(change, task="a"))
        assert await asyncio.to_thread(is_pinning.wait, 5)
        await asyncio.gather(first, runtime.call(change, task="b"))

        assert {ref.task for ref in engine.pinned} == {"a", "b"}

    run(tmp_path, body)


def test_row_holds_the_version_that_was_active_when_it_was_prepared(tmp_path: Path) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        tasks = runtime.parts.tasks
        for value in (0.1, 0.2):
            upload = PromptUpload(task="t", file=make_prompt_file(value), config=make_prompt_config())
            view, is_new = await runtime.call(tasks.upload, LOCAL_CALLER, upload)
            assert is_new
            generation = await runtime.prepare(LOCAL_CALLER, make_spec(reference="t"))
            assert generation.rows[0].prompt is not None
            assert generation.rows[0].prompt.digest == view.version.digest
        with pytest.raises(TaskNotFoundError):
            await runtime.prepare(LOCAL_CALLER, make_spec(reference="nobody"))

    run(tmp_path, body)


def test_what_the_store_remembers_is_resolved_without_its_threads(tmp_path: Path) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        tasks = runtime.parts.tasks
        upload = PromptUpload(task="t", file=make_prompt_file(0.1), config=make_prompt_config())
        await runtime.call(tasks.upload, LOCAL_CALLER, upload)
        calls: list[object] = []
        call = runtime.call

        async def counted(function: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append(function)
            return await call(function, *arguments, **keywords)

        runtime.call = counted  # type: ignore[method-assign]
        first = await runtime.prepare(LOCAL_CALLER, make_spec(reference="t"))
        assert tasks.resolve_all in calls
        runtime.store._cache._last_poll = runtime.quotas._accounts["default"].fresh_until_s = float("inf")
        calls.clear()
        again = await runtime.prepare(LOCAL_CALLER, make_spec(reference="t"))
        assert not calls
        assert again.rows[0].prompt == first.rows[0].prompt

        upload = PromptUpload(task="t", file=make_prompt_file(0.2), config=make_prompt_config())
        await runtime.call(tasks.upload, LOCAL_CALLER, upload)
        changed = await runtime.prepare(LOCAL_CALLER, make_spec(reference="t"))
        assert changed.rows[0].prompt is not None
        assert changed.rows[0].prompt.version == 2

    run(tmp_path, body)


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_canary_answers_the_same_requests_remembered_or_not(tmp_path: Path, percent: int) -> None:
    async def body(runtime: Runtime, parts: EchoServerParts) -> None:
        tasks = runtime.parts.tasks
        for value in (0.1, 0.2):
            upload = PromptUpload(
                task="t", file=make_prompt_file(value), config=make_prompt_config(), activate=value == 0.1
            )
            await runtime.call(tasks.upload, LOCAL_CALLER, upload)
        await runtime.call(
            tasks.update_task,
            LOCAL_CALLER,
            "t",
            active_version=None,
            expected_version=None,
            pinned=None,
            canary=Canary(2, percent),
        )
        ids = [f"request-{i}" for i in range(200)]
        asked = [tasks.resolve_all("default", ("t",), request_id)["t"] for request_id in ids]
        runtime.store._cache._last_poll = float("inf")
        remembered = [tasks.resolve_remembered("default", ("t", "tiny/echo"), request_id) for request_id in ids]

        assert remembered == [{"t": ref, "tiny/echo": None} for ref in asked]
        assert {ref.version for ref in asked if ref is not None} == {1, 2}
        assert tasks.resolve_remembered("default", ("t", "unknown"), "x") is None

    run(tmp_path, body)
