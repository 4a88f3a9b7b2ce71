"""The check itself: every question alone, then all of them in each other's company, several times, in other orders."""

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from server.check.asking import Answer, AskError, Question, Server
from server.check.comparing import TOLERANCES, compare
from server.check.report import CheckReport, SubjectReport
from server.check.subjects import Subject, find_subjects, was_rolled_out

# Texts that favour no task: short and long, in and out of English, and one that is no sentence.
TEXTS = (
    "The",
    "Yesterday the weather was mild, and the harbour lay quiet until the ferry came in.",
    "1, 2, 3,",
    "Une phrase courte",
)
_RUNNING = "promptmux_num_requests_running"
_VIOLATIONS = "promptmux_isolation_violations_total"

# One question: which subject, and which text.
_Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """`tolerance` None: by the backbone's number format."""

    references: Sequence[str]
    texts: Sequence[str] = TEXTS
    num_rounds: int = 3
    concurrency: int = 16
    together: int = 8
    max_found: int = 16
    tolerance: float | None = None
    seed: int = 0


class IsolationCheck:
    """One run against one server. `say` is called with what is being done now."""

    def __init__(self, server: Server, options: CheckOptions, say: Callable[[str], None] = lambda _: None) -> None:
        self._server = server
        self._options = options
        self._say = say
        self._random = random.Random(options.seed)  # noqa: S311 - an order, no secret
        self._slots = asyncio.Semaphore(options.concurrency)
        self._alone: dict[_Key, Answer] = {}
        self._reports: list[SubjectReport] = []
        self._num_disturbed = 0

    async def run(self) -> CheckReport:
        """Raises AskError where nothing can be asked at all; what fails later is in the report."""
        options = self._options
        dtype = await self._dtype()
        tolerance = (
            options.tolerance if options.tolerance is not None else TOLERANCES.get(dtype, max(TOLERANCES.values()))
        )
        found = await find_subjects(self._server, options.references, max_found=options.max_found, seed=options.seed)
        self._reports = [SubjectReport(subject) for subject in found]
        violations = await self._server.metric(_VIOLATIONS) or 0.0
        await self._ask_alone()
        for number in range(options.num_rounds):
            self._say(f"round {number + 1} of {options.num_rounds}: all together")
            await self._ask_mixed(tolerance)
        violations = (await self._server.metric(_VIOLATIONS) or 0.0) - violations
        return CheckReport(
            subjects=self._reports,
            dtype=dtype,
            tolerance=tolerance,
            alike=self._find_alike(tolerance),
            num_disturbed=self._num_disturbed,
            num_violations=max(0, int(violations)),
        )

    async def _dtype(self) -> str:
        backbone = (await self._server.get("/version")).get("backbone")
        if not isinstance(backbone, dict):
            raise AskError("the server has not loaded its backbone yet", status=503)
        return str(backbone.get("dtype", "")).removeprefix("torch.")

    async def _ask_alone(self) -> None:
        keys = list(itertools.product(range(len(self._reports)), range(len(self._options.texts))))
        for done, key in enumerate(keys):
            self._say(f"alone: {done + 1} of {len(keys)}")
            self._num_disturbed += bool(await self._server.metric(_RUNNING))
            report = self._reports[key[0]]
            try:
                answer = await self._server.ask(self._question(key))
            except AskError as error:
                report.errors.append(f"alone: {error}")
                continue
            if await self._has_right_digest(report, answer, "alone"):
                self._alone[key] = answer

    async def _ask_mixed(self, tolerance: float) -> None:
        """One request for each question, and each question again in a request with others, all at the same time."""
        singles, grouped = list(self._alone), list(self._alone)
        self._random.shuffle(singles)
        self._random.shuffle(grouped)
        size = self._options.together
        groups = [grouped[start : start + size] for start in range(0, len(grouped), size)]
        requests: list[Coroutine[Any, Any, None]] = [self._ask_one(key, tolerance) for key in singles]
        requests += [self._ask_group(group, tolerance) for group in groups]
        self._random.shuffle(requests)
        await asyncio.gather(*requests)

    async def _ask_one(self, key: _Key, tolerance: float) -> None:
        async with self._slots:
            try:
                answer = await self._server.ask(self._question(key))
            except AskError as error:
                self._reports[key[0]].errors.append(f"in company: {error}")
                return
        await self._judge(key, answer, tolerance, "in company")

    async def _ask_group(self, keys: Sequence[_Key], tolerance: float) -> None:
        async with self._slots:
            try:
                answers = await self._server.ask_together([self._question(key) for key in keys])
            except AskError as error:
                for index in sorted({key[0] for key in keys}):
                    self._reports[index].errors.append(f"in one request with others: {error}")
                return
        for key, answer in zip(keys, answers, strict=True):
            await self._judge(key, answer, tolerance, "in one request with others")

    async def _judge(self, key: _Key, answer: Answer, tolerance: float, where: str) -> None:
        report = self._reports[key[0]]
        if await self._has_right_digest(report, answer, where):
            text = self._options.texts[key[1]]
            report.take(compare(self._alone[key], answer, tolerance), f"{where}, to {text[:40]!r}")

    async def _has_right_digest(self, report: SubjectReport, answer: Answer, where: str) -> bool:
        """Whether the answer can be compared. A digest that the server does not account for is a mix-up."""
        if answer.digest == report.subject.digest:
            return True
        try:
            is_new = report.changed_to is not None and answer.digest == report.changed_to
            is_new = is_new or await was_rolled_out(self._server, report.subject, answer.digest)
        except AskError as error:
            report.errors.append(f"{where}: {error}")
            return False
        if is_new:
            report.changed_to = answer.digest
        else:
            report.add_fault(f"{where}: digest {_short(answer.digest)} answered, not {_short(report.subject.digest)}")
        return False

    def _question(self, key: _Key) -> Question:
        return Question(self._reports[key[0]].subject.reference, self._options.texts[key[1]])

    def _find_alike(self, tolerance: float) -> list[tuple[str, str]]:
        """Pairs of subjects that nothing of what was asked tells apart. Two names of one prompt are no such pair."""
        pairs = itertools.combinations(range(len(self._reports)), 2)
        return [
            (self._subject(first).name, self._subject(second).name)
            for first, second in pairs
            if self._subject(first).digest != self._subject(second).digest and self._are_alike(first, second, tolerance)
        ]

    def _are_alike(self, first: int, second: int, tolerance: float) -> bool:
        texts = [t for t in range(len(self._options.texts)) if (first, t) in self._alone and (second, t) in self._alone]
        return bool(texts) and all(
            compare(self._alone[first, text], self._alone[second, text], tolerance).fault is None for text in texts
        )

    def _subject(self, index: int) -> Subject:
        return self._reports[index].subject


def _short(digest: str | None) -> str:
    return "no prompt" if digest is None else digest[:12]
