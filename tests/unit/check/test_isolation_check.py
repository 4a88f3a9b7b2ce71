"""The self-check against live servers over the echo engine: a sound one, broken ones, and one that is rolled out."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.check.asking import AskError, Server
from server.check.report import CheckReport
from server.check.run import CheckOptions, IsolationCheck
from server.cli.output import ExitCode
from server.engine.request import PromptRef, RowRequest
from server.errors import IsolationError
from server.metrics import Metrics
from server.runtime.protocols import LoadPrompt
from server.settings import Settings
from tests.fakes import EchoEngine, EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server
from tests.unit.cli.live import call

TASKS = ("alpha", "beta", "gamma")
TEXTS = ("one", "another one")


class MixingEngine(EchoEngine):
    """Gives rows of one task the prompt of another while several rows are there: a gather by a wrong index."""

    victim, other = "alpha", "beta"
    seen: PromptRef | None = None

    def submit(self, rows: Sequence[RowRequest]) -> None:
        self.seen = next((r.prompt for r in rows if r.prompt and r.prompt.task == self.other), self.seen)
        super().submit([self._mix(row) for row in rows] if len(rows) > 1 else rows)

    def _mix(self, row: RowRequest) -> RowRequest:
        if row.prompt is None or row.prompt.task != self.victim or self.seen is None:
            return row
        return dataclasses.replace(row, prompt=self.seen)


class MixingParts(EchoServerParts):
    def make_engine(
        self, backbone: object, settings: Settings, metrics: Metrics, load_prompt: LoadPrompt
    ) -> EchoEngine:
        self.engine = MixingEngine(max_waiting_rows=settings.max_waiting_rows, load_prompt=load_prompt)
        return self.engine


def upload_all(live: LiveServer) -> None:
    for number, task in enumerate(TASKS):
        assert live.upload(task, (number + 1) / 8).is_success


def digest_of(live: LiveServer, task: str, version: int) -> str:
    with live.client() as client:
        digest: str = client.get(f"/v1/tasks/{task}/versions/{version}").json()["digest"]
    return digest


def check(live: LiveServer, say: Callable[[str], None] = lambda _: None, **options: Any) -> CheckReport:
    async def run() -> CheckReport:
        async with Server(live.url, None, max_tokens=12) as server:
            chosen = CheckOptions(**{"references": TASKS, "texts": TEXTS, "num_rounds": 2, **options})
            return await IsolationCheck(server, chosen, say).run()

    return asyncio.run(run())


def verdicts(report: CheckReport) -> dict[str | None, str]:
    return {item.subject.task: item.verdict for item in report.subjects}


def test_a_sound_server_passes_and_every_question_was_asked_alone_and_in_company(live: LiveServer) -> None:
    upload_all(live)

    report = check(live)

    assert report.is_sound
    assert verdicts(report) == {**dict.fromkeys(TASKS, "same"), None: "same"}
    # Each round asks a question in a request of its own and in one with others.
    assert {item.num_mixed for item in report.subjects} == {2 * 2 * len(TEXTS)}
    assert {item.num_tokens for item in report.subjects} == {12 * 2 * 2 * len(TEXTS)}
    assert (report.num_disturbed, report.alike) == (0, [])


@pytest.mark.usefixtures("_quiet")
def test_a_task_answered_with_another_s_prompt_in_company_is_caught(tmp_path: Path) -> None:
    with running_server(tmp_path / "data", parts=MixingParts()) as live:
        upload_all(live)

        report = check(live)
        shown = call(live, "check", *TASKS, "--max-tokens", "12")

    assert not report.is_sound
    assert verdicts(report) == {"alpha": "mismatch", "beta": "same", "gamma": "same", None: "same"}
    assert shown.exit_code == ExitCode.FAILED
    assert "does NOT hold" in shown.stderr
    assert "alone" in shown.stderr


@pytest.mark.usefixtures("_quiet")
def test_an_answer_under_another_s_digest_is_caught(tmp_path: Path) -> None:
    class WrongDigests(Server):
        async def ask_together(self, questions: Any) -> Any:
            found = await super().ask_together(questions)
            return [*found[1:], found[0]]

    async def run(url: str) -> CheckReport:
        async with WrongDigests(url, None, max_tokens=12) as server:
            return await IsolationCheck(server, CheckOptions(references=TASKS, texts=TEXTS)).run()

    with running_server(tmp_path / "data") as live:
        upload_all(live)
        report = asyncio.run(run(live.url))

    assert not report.is_sound
    assert any("digest" in fault for item in report.subjects for fault in item.faults)


@pytest.mark.usefixtures("_quiet")
def test_rows_that_the_server_stops_itself_are_errors_of_their_task(live: LiveServer) -> None:
    upload_all(live)

    def break_it(doing: str) -> None:
        if doing.startswith("round"):
            live.engine.errors["another one"] = IsolationError("the plan and the ledger disagree")

    report = check(live, break_it)

    assert not report.is_sound
    assert set(verdicts(report).values()) == {"error"}


def test_a_roll_out_under_the_check_is_said_and_is_no_mismatch(live: LiveServer) -> None:
    upload_all(live)

    def roll_out(doing: str) -> None:
        if doing.startswith("round 1"):
            assert live.upload("alpha", 0.9).is_success

    report = check(live, roll_out)

    assert report.is_sound
    assert verdicts(report) == {"alpha": "changed", "beta": "same", "gamma": "same", None: "same"}
    assert report.subjects[0].changed_to == digest_of(live, "alpha", 2)


def test_a_version_that_is_named_is_checked_whatever_is_rolled_out(live: LiveServer) -> None:
    upload_all(live)

    def roll_out(doing: str) -> None:
        if doing.startswith("round 1"):
            assert live.upload("alpha", 0.9).is_success

    report = check(live, roll_out, references=["alpha@1", "beta"])

    assert verdicts(report) == {"alpha": "same", "beta": "same", None: "same"}


def test_a_digest_that_is_named_is_checked(live: LiveServer) -> None:
    upload_all(live)
    digest = digest_of(live, "alpha", 1)

    report = check(live, references=[f"alpha@sha256:{digest}", "beta"])

    assert report.is_sound
    assert report.subjects[0].subject.digest == digest


def test_without_names_a_sample_of_the_tasks_is_checked(live: LiveServer) -> None:
    upload_all(live)

    assert len(check(live, references=(), max_found=2).subjects) == 3
    assert set(verdicts(check(live, references=()))) == {*TASKS, None}


def test_tasks_that_answer_alike_are_told(live: LiveServer) -> None:
    for number, task in enumerate(("past", "plural", "gamma")):
        assert live.upload(task, (number + 1) / 8).is_success

    async def run() -> CheckReport:
        # Of the echo engine's answers two tokens are compared, a bracket and the first letter of the task.
        async with Server(live.url, None, max_tokens=2) as server:
            return await IsolationCheck(server, CheckOptions(references=["past", "plural", "gamma"])).run()

    assert asyncio.run(run()).alike == [("past", "plural")]


@pytest.mark.parametrize("reference", ["nothing-like-it", "alpha@9"])
def test_what_is_not_there_cannot_be_checked(live: LiveServer, reference: str) -> None:
    upload_all(live)

    with pytest.raises(AskError) as caught:
        check(live, references=[reference])
    assert caught.value.status == 404
    assert call(live, "check", reference).exit_code == ExitCode.NOT_FOUND


def test_the_command_prints_a_line_a_task_and_json_for_programs(live: LiveServer) -> None:
    upload_all(live)

    shown = call(live, "check", "alpha", "beta", "--rounds", "1", "--input", "hello")
    found = json.loads(call(live, "check", "alpha", "beta", "--rounds", "1", "--json").stdout)

    assert shown.exit_code == ExitCode.OK
    assert [line.split()[0] for line in shown.stdout.splitlines()][:3] == ["task", "alpha", "beta"]
    assert "isolation holds" in shown.stderr
    assert found["sound"] is True
    assert [item["verdict"] for item in found["tasks"]] == ["same", "same", "same"]


def test_the_command_reads_its_texts_from_a_file(live: LiveServer, tmp_path: Path) -> None:
    upload_all(live)
    file = tmp_path / "probes.jsonl"
    file.write_text('{"prompt": "first text", "completion": "x"}\n{"prompt": "second text"}\n')

    assert call(live, "check", "alpha", "--inputs", str(file), "--rounds", "1").exit_code == ExitCode.OK
    said = {bytes(i for i in row.token_ids if i < 256) for row in live.engine.submitted}
    assert {b"first text", b"second text"} <= said


def test_no_server_is_unreachable() -> None:
    from typer.testing import CliRunner

    from server.cli import app

    result = CliRunner().invoke(app, ["check", "alpha", "--url", "http://127.0.0.1:1"])

    assert result.exit_code == ExitCode.UNREACHABLE
