"""The server as a user meets it: the real process, the real backbone, the demo prompts, the lines that README prints.

One server is started for all of it, on a fresh data folder and an ephemeral port, and ended with SIGINT.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
TIMEOUT_S = 240


@dataclass(frozen=True, slots=True)
class RealServer:
    url: str
    printed: str
    process: "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0"]
    command += ["--demo-dir", str(DEMO), "--data-dir", str(tmp_path_factory.mktemp("data"))]
    command += ["--audit-share", "1.0", "--dtype", "float32"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    printed = ""
    for line in process.stderr:
        printed += line
        if line.startswith("Ctrl-C"):
            break
    else:
        pytest.fail(f"the server ended before it was ready:\n{printed}")
    # A pipe that nobody reads fills up and stops the writer.
    reader = threading.Thread(target=process.stderr.read, daemon=True)
    reader.start()
    found = re.search(r"at (http://\S+)", printed)
    assert found is not None
    yield RealServer(found[1], printed, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    reader.join()
    process.stderr.close()


def cards() -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(DEMO.glob("*/card.json"))}


def shell(command: str, **variables: str) -> str:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_the_printed_curl_lines_work_as_pasted(server: RealServer) -> None:
    lines = [line for line in server.printed.splitlines() if line.startswith("curl ")]
    promised = [found[1].split(", ") for found in re.finditer(r"answers?: (.+)", server.printed)]

    answers = [json.loads(shell(line)) for line in lines]

    assert len(lines) == 3
    for answer, expected in zip(answers[:2], promised, strict=True):
        assert [choice["text"].strip() for choice in answer["choices"]] == expected
    assert (answers[2]["object"], answers[2]["task"]) == ("prompt_version", "my-task")


def test_the_readme_shell_block_works_as_pasted(server: RealServer) -> None:
    block = re.search(r"## Try it\n\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None

    commands = block[1].replace("http://127.0.0.1:8000", server.url)
    # The command line of the environment that runs the tests, wherever that is.
    commands = commands.replace(".venv/bin/promptmux", str(Path(sys.executable).with_name("promptmux")))
    output = shell(commands, PROMPTMUX_URL=server.url)

    assert '"text":" went"' in output
    assert '"text":" taught"' in output
    assert '"text":" positive"' in output
    assert "promptmux_isolation_checks_total" in output
    assert re.search(r"^my-task +.*same", output, re.MULTILINE), "what `promptmux check` found"


def test_every_demo_prompt_answers_as_its_card_says_in_one_mixed_batch(server: RealServer) -> None:
    examples = [
        (task, example)
        for task, card in cards().items()
        for example in card["examples"]  # type: ignore[attr-defined]
    ]
    body = {
        "tasks": [task for task, _ in examples],
        "prompt": [example["prompt"] for _, example in examples],
        "max_tokens": 24,
        "temperature": 0,
    }

    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status().json()

    texts = [choice["text"].strip() for choice in answer["choices"]]
    # The cards were written in bf16, this server runs in fp32: a near-tie may fall the other way, a mix-up cannot hide.
    same = sum(text == example["answer"] for text, (_, example) in zip(texts, examples, strict=True))
    assert same >= 0.9 * len(examples)
    assert [choice["task"] for choice in answer["choices"]] == [task for task, _ in examples]
    digests = {choice["task"]: choice["prompt"]["digest"] for choice in answer["choices"]}
    assert len(set(digests.values())) == len(cards())


def test_openai_clients_stream_many_tasks_at_once_and_each_gets_its_own_answer(server: RealServer) -> None:
    chosen = [(task, card["examples"][0]) for task, card in cards().items()]  # type: ignore[index]

    async def ask(client: openai.AsyncOpenAI, task: str, prompt: str) -> str:
        stream = await client.completions.create(model=task, prompt=prompt, max_tokens=24, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, task, example["prompt"]) for task, example in chosen))

    def alone(task: str, prompt: str) -> str:
        body = {"model": task, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status().json()
        return str(answer["choices"][0]["text"])

    together = asyncio.run(ask_all())

    assert together == [alone(task, example["prompt"]) for task, example in chosen]


def test_the_audit_agrees_with_what_was_served(server: RealServer) -> None:
    body = {"model": "word-sentiment", "prompt": "terrible ->", "max_tokens": 4, "temperature": 0}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status()
    pattern = re.compile(r'^promptmux_isolation_audits_total\{result="(\w+)"\} (\S+)$', re.MULTILINE)

    def counts() -> dict[str, float]:
        return {name: float(value) for name, value in pattern.findall(httpx.get(f"{server.url}/metrics").text)}

    # The replay follows the answer; pytest's own time limit ends a wait in vain.
    while counts()["match"] == 0:
        httpx.get(f"{server.url}/readyz").raise_for_status()

    assert counts()["mismatch"] == 0
    assert "promptmux_isolation_violations_total 0.0" in httpx.get(f"{server.url}/metrics").text
