"""The gate: a version uploaded with probes and a threshold becomes active only if it answers enough of them.

Owns the background work, one version at a time: which is next, how far it is, what came of it. A probe passes when the
greedy answer, of at most so many tokens as its completion has and `NUM_SPARE_TOKENS` more, is the completion
(`answers.is_expected`); the score is the share that passes. The store decides what a passed gate changes: it activates
the version if what was active at the upload still is, else it says `conflict`. What was begun and not ended, by a
drain or a crash, is begun anew by the next start. Refuses to know HTTP. The event loop's thread alone uses it, but for
`add`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from prompt_store.manifest import GateStatus, PromptVersion
from server.errors import (
    DrainingError,
    EngineFailedError,
    PromptmuxError,
    QuotaExceededError,
    TaskNotFoundError,
    UnavailableError,
)
from server.runtime.answers import Ask, Question, answer, is_expected, slices, tokenize_questions
from server.tenancy.keys import Caller

if TYPE_CHECKING:
    from server.runtime.service import Runtime

NUM_SPARE_TOKENS = 4
MAX_FAILURES_SHOWN = 10
# Where a gate's detail holds texts of its probes.
FAILURES = "failures"
MAX_SHOWN_CHARS = 200
# How long a full queue, or a tenant that has used up its quota, is left alone.
RETRY_S = 1.0
# Quotas are counted by the minute.
MAX_QUOTA_RETRIES = 60
# Each report is a write to the disk.
PROGRESS_INTERVAL_S = 2.0

_log = structlog.get_logger("promptmux.gates")

_Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What there is to report of a gate."""

    status: GateStatus
    score: float | None
    detail: Mapping[str, Any]


class GateRunner:
    """Tries versions whose gate is pending, oldest first, from `start` to `stop`."""

    def __init__(self, runtime: "Runtime") -> None:
        self._runtime = runtime
        self._waiting: OrderedDict[_Key, PromptVersion] = OrderedDict()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Takes up what an earlier server left, and then what comes."""
        self._runtime.parts.tasks.on_pending_gate(self.add)
        self._task = asyncio.create_task(self._run())

    def add(self, version: PromptVersion) -> None:
        """The version's gate is pending. Any thread may call this, also after `stop`: it then waits for a new start."""
        try:
            self._loop.call_soon_threadsafe(self._put, version)
        except RuntimeError:
            # The loop is gone; the store remembers.
            return

    def stop(self) -> None:
        """Begin no more, and give up what runs; it will be pending. Returns at once; may be called twice."""
        if self._task is not None and not self._is_stopping:
            # Once: a second time would cut off the giving back.
            self._is_stopping = True
            self._task.cancel()

    async def wait_stopped(self) -> None:
        """Waits until what ran has been given back to the store. Call `stop` before."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def _put(self, version: PromptVersion) -> None:
        self._waiting[version.tenant, version.task, version.version] = version
        self._changed.set()

    async def _run(self) -> None:
        try:
            for version in await self._runtime.call(self._runtime.parts.tasks.unfinished_gates):
                self._put(version)
        except PromptmuxError as error:
            _log.warning("gates_not_resumed", error=error.message)
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            _, version = self._waiting.popitem(last=False)
            await self._try_version(version)

    async def _try_version(self, version: PromptVersion) -> None:
        try:
            outcome = await self._measure(version)
        except TaskNotFoundError:
            # Deleted meanwhile, and its gate with it.
            return
        except (asyncio.CancelledError, DrainingError, EngineFailedError):
            await asyncio.shield(self._give_back(version))
            raise
        except PromptmuxError as error:
            outcome = _Outcome("error", None, {"message": error.message, "code": error.code})
        except Exception:
            _log.exception("gate_failed", task=version.task, version=version.version)
            outcome = _Outcome("error", None, {"message": "The server failed.", "code": "internal_error"})
        ending = asyncio.ensure_future(self._end(version, outcome))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            # What is known by now is not thrown away.
            await ending
            raise

    async def _measure(self, version: PromptVersion) -> _Outcome:
        tasks, runtime = self._runtime.parts.tasks, self._runtime
        probes = await runtime.call(tasks.read_probes, version)
        questions = await runtime.run_tokenizer(
            sum(len(probe.prompt) + len(probe.completion) for probe in probes),
            tokenize_questions,
            [(probe.prompt, probe.completion) for probe in probes],
            runtime.parts.codec,
            max_model_len=runtime.parts.backbone.max_model_len,
            param="probes",
        )
        await self._report(version, _Outcome("running", None, {"num_done": 0}))
        reported_at = time.monotonic()
        answers: list[str] = []
        max_tokens = max(_max_tokens(question) for question in questions)
        for places in slices(len(questions), rows_each=1, max_tokens=max_tokens, settings=runtime.settings):
            answers.extend(await self._ask(version, [questions[place] for place in places]))
            if len(answers) < len(questions) and time.monotonic() - reported_at > PROGRESS_INTERVAL_S:
                await self._report(version, _Outcome("running", None, {"num_done": len(answers)}))
                reported_at = time.monotonic()
        failures = [
            (question, text)
            for question, text in zip(questions, answers, strict=True)
            if not is_expected(text, question.completion or "")
        ]
        num_passed = len(questions) - len(failures)
        score = num_passed / len(questions)
        assert version.gate is not None
        status: GateStatus = "passed" if score >= version.gate.threshold else "failed"
        detail = {
            "num_passed": num_passed,
            FAILURES: [
                {"prompt": _cut(question.prompt), "expected": _cut(question.completion or ""), "answer": _cut(text)}
                for question, text in failures[:MAX_FAILURES_SHOWN]
            ],
        }
        return _Outcome(status, score, detail)

    async def _ask(self, version: PromptVersion, questions: Sequence[Question]) -> list[str]:
        """Goes on trying while the server has no room; no longer than a minute while the tenant's quota has none, for
        other tenants' gates wait meanwhile.
        """
        caller = Caller(tenant=version.tenant, scopes=frozenset({"infer"}))
        reference = f"{version.task}@{version.version}"
        asks = [Ask(question, reference, _max_tokens(question)) for question in questions]
        num_refused = 0
        while True:
            try:
                return await answer(self._runtime, caller, asks, param="probes", fills_context=True)
            except (DrainingError, EngineFailedError):
                raise
            except QuotaExceededError:
                num_refused += 1
                if num_refused > MAX_QUOTA_RETRIES:
                    raise
            except UnavailableError:
                pass
            await asyncio.sleep(RETRY_S)

    async def _end(self, version: PromptVersion, outcome: _Outcome) -> None:
        try:
            ended = await self._report(version, outcome)
        except TaskNotFoundError:
            return
        except PromptmuxError as error:
            # It says `running` still, and is begun anew by the next start.
            _log.warning("gate_not_reported", task=version.task, version=version.version, error=error.message)
            return
        result = ended.gate.status if ended.gate is not None else outcome.status
        self._runtime.metrics.gate_runs_total.labels(result=result).inc()
        _log.info(
            "gate_ended",
            tenant=version.tenant,
            task=version.task,
            version=version.version,
            digest=version.digest,
            result=result,
            score=outcome.score,
        )

    async def _give_back(self, version: PromptVersion) -> None:
        try:
            await self._report(version, _Outcome("pending", None, {}))
        except PromptmuxError as error:
            _log.warning("gate_not_given_back", task=version.task, version=version.version, error=error.message)

    async def _report(self, version: PromptVersion, outcome: _Outcome) -> PromptVersion:
        return await self._runtime.call(
            self._runtime.parts.tasks.set_gate,
            version,
            status=outcome.status,
            score=outcome.score,
            detail=outcome.detail,
        )


def _max_tokens(question: Question) -> int:
    return len(question.completion_ids) + NUM_SPARE_TOKENS


def _cut(text: str) -> str:
    # The store keeps no NUL characters; an answer may be made of any bytes.
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
