"""`promptmux bench` against a real server over a tiny model, and with the same model in this process."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner, Result

from prompt_store.store import PromptStore
from server.app import load_configured_backbone
from server.cli import app
from server.cli.output import ExitCode
from server.settings import Settings
from tests.factories import HIDDEN_SIZE, VOCAB_SIZE
from tests.fakes import EchoServerParts, make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer, running_server

SIZES = ("--requests", "12", "--prompt-tokens", "2-6", "--new-tokens", "lognormal:4:0.5:2-8", "--warmup", "2")
TINY = ("--dtype", "float32", "--device", "cpu", "--max-model-len", "128", "--kv-cache-bytes", "4MiB", "-k", "3")


class TinyServerParts(EchoServerParts):
    """The real backbone and engine in place of the echo's."""

    def load_backbone(self, settings: Settings) -> Any:
        return load_configured_backbone(settings)

    def make_engine(self, backbone: Any, settings: Settings, metrics: Any, load_prompt: Any) -> Any:
        from server.engine.config import EngineConfig
        from server.engine.engine import Engine

        return Engine(backbone, EngineConfig(max_rows=4, kv_cache_bytes=4 << 20), metrics, load_prompt)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Servers run in this process: their log lines must not mix with what a command prints."""
    was_configured, config = structlog.is_configured(), structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**config)


@pytest.fixture(scope="module")
def live(
    quiet: None, tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Callable[[str], Path]
) -> Iterator[LiveServer]:
    """A server with the tasks `one` and `two` over a tiny llama."""
    settings = {"model": str(tiny_backbone_folder("llama")), "dtype": "float32", "device": "cpu", "max_model_len": 128}
    with running_server(tmp_path_factory.mktemp("data"), parts=TinyServerParts(), **settings) as server:
        for task, value in (("one", 0.25), ("two", 0.5)):
            files = {
                "file": ("adapter_model.safetensors", make_prompt_file(value, hidden_size=HIDDEN_SIZE)),
                "config": ("adapter_config.json", make_prompt_config(hidden_size=HIDDEN_SIZE)),
            }
            with server.client() as client:
                client.post(f"/v1/tasks/{task}/versions", files=files).raise_for_status()
        yield server


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def online(live: LiveServer, *arguments: str) -> Result:
    return bench("--url", live.url, "--vocab-size", str(VOCAB_SIZE), *SIZES, *arguments)


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == ExitCode.OK, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def requests_of(live: LiveServer, task: str) -> int:
    with live.client() as client:
        return int(client.get(f"/v1/tasks/{task}/stats").json()["requests"])


def test_online_measures_all_tasks_that_the_key_may_call(live: LiveServer) -> None:
    before = {task: requests_of(live, task) for task in ("one", "two")}
    report = report_of(online(live, "--concurrency", "4", "--json", "-"))

    assert report["mode"] == "online"
    assert report["target"]["backbone"]["name"] == "llama"
    assert report["requests"] == {
        "total": 12,
        "failed": 0,
        "failures": {},
        "failure_messages": {},
        "max_in_flight": 4,
        "max_send_lag_ms": 0,
        "distinct_prompts": 2,
    }
    assert 2 * 12 <= report["tokens"]["new"] <= 8 * 12
    assert report["latency_ms"]["ttft"]["count"] == 12
    assert report["latency_ms"]["itl"]["count"] == report["tokens"]["new"] - 12
    assert set(report["steps"]["mean_phase_ms"]) == {"plan", "forward", "sample", "deliver"}
    assert 1 <= report["steps"]["mean_rows"] <= 4
    # Half of the twelve, and one of the two that warmed up.
    for task in ("one", "two"):
        live.wait_until(lambda task=task: requests_of(live, task) == before[task] + 7)


def test_online_sends_what_was_measured_offline(live: LiveServer, tiny_backbone_folder: Callable[[str], Path]) -> None:
    arguments = (*SIZES, "--no-prompt", "--json", "-", "--seed", "3")
    there = report_of(online(live, "--no-prompt", "--json", "-", "--seed", "3"))
    here = report_of(bench(str(tiny_backbone_folder("llama")), "--offline", *TINY[:-2], *arguments))

    assert there["tokens"] == here["tokens"]
    assert there["options"] == here["options"]
    assert here["mode"] == "offline"


def test_one_task_by_name_and_version_in_an_open_loop_by_zipf_s_law(live: LiveServer) -> None:
    report = report_of(online(live, "--task", "one@1", "--task", "two", "--rate", "200", "--zipf", "1", "--json", "-"))

    assert (report["options"]["loop"], report["options"]["rate"], report["options"]["zipf"]) == ("open", 200, 1)
    assert report["options"]["num_prompts"] == 2


def test_a_duration_ends_a_run(live: LiveServer) -> None:
    result = bench(
        "--url", live.url, "--vocab-size", str(VOCAB_SIZE), "--duration", "0.3", "--concurrency", "2", "--json", "-"
    )

    report = report_of(result)
    assert report["wall_s"] >= 0.3
    assert report["requests"]["total"] >= 2
    assert report["options"]["num_requests"] is None


def test_tables_and_files_for_people_and_programs(live: LiveServer, tmp_path: Path) -> None:
    result = online(
        live, "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plots"), "--slo-ttft-ms", "60000"
    )

    assert result.exit_code == ExitCode.OK, result.output
    assert "requests that ended well  12 of 12" in result.stdout
    assert "time to first token" in result.stdout
    assert "forward" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["goodput"]["good_requests"] == 12
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"latency.png", "timeline.png", "steps.png"}


def test_failed_requests_are_reported_and_make_the_exit_code(live: LiveServer) -> None:
    # Lengths beyond the context of 128 are refused; those within it are answered.
    result = online(live, "--prompt-tokens", "2-400", "--json", "-", "--warmup", "0")

    assert result.exit_code == ExitCode.FAILED
    report = json.loads(result.stdout)
    failed = report["requests"]["failed"]
    assert 0 < failed < 12
    assert report["requests"]["failures"] == {"context_length_exceeded": failed}
    assert f"{failed} of 12 requests failed" in result.stderr


def test_a_key_is_needed_where_there_are_keys_and_never_reported(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data", exclusive=False) as store:
        _, secret = store.create_key("default", ("infer",))
    with running_server(tmp_path / "data") as echo:
        arguments = ("--url", echo.url, "--vocab-size", "256", "--no-prompt", "--json", "-", "--requests", "2")
        assert bench(*arguments).exit_code == ExitCode.DENIED
        result = CliRunner().invoke(app, ["bench", *arguments], env={"PROMPTMUX_KEY": secret})

    assert report_of(result)["requests"]["total"] == 2
    assert secret not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--vocab-size", "5000"), ExitCode.REFUSED, "--vocab-size"),
        (("--task", "nobody"), ExitCode.NOT_FOUND, "nobody"),
    ],
)
def test_what_the_server_refuses_ends_it_before_the_load(
    live: LiveServer, arguments: tuple[str, ...], code: ExitCode, says: str
) -> None:
    result = bench("--url", live.url, "--requests", "3", *arguments)

    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert not result.stdout


def test_no_server_and_no_task_have_codes_of_their_own(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = bench("--url", f"http://127.0.0.1:{taken.getsockname()[1]}")
    with running_server(tmp_path / "data") as echo:
        nothing = bench("--url", echo.url)

    assert nowhere.exit_code == ExitCode.UNREACHABLE
    assert nothing.exit_code == ExitCode.NOT_FOUND
    assert "--no-prompt" in nothing.stderr


def test_offline_measures_the_engine_and_profiles_it(
    tiny_backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = bench(
        str(tiny_backbone_folder("llama")),
        "--offline",
        *TINY,
        *SIZES,
        *("--num-prompts", "5", "--max-rows", "3", "--profile", str(tmp_path / "trace.json"), "--json", "-"),
    )

    report = report_of(result)
    assert report["target"]["backbone"]["dtype"] == "float32"
    backbone, engine = report["target"]["backbone"], report["target"]["engine"]
    assert backbone["kernel"] in {"native", "gather"}
    assert backbone["weight_form"] in {"native", "onednn", "plain"}
    assert (backbone["quantization"], backbone["compiled"], backbone["compiled_sizes"]) == ("none", "off", [])
    assert (engine["max_rows"], engine["deterministic"], engine["text_cache"]) == (3, False, True)
    assert (engine["audit_share"], engine["kv_cache_bytes"]) == (0.01, 4 << 20)
    assert report["target"]["virtual_tokens"] == 3
    assert (report["requests"]["total"], report["requests"]["distinct_prompts"]) == (12, 5)
    assert report["steps"]["mean_rows"] <= 3
    assert report["is_profiled"] is True
    # Which operators they are is the engine's affair; those of its thread run at least once a step.
    assert max(operator["calls"] for operator in report["operators"]) >= report["steps"]["count"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_offline_says_why_a_backbone_cannot_be_had(tmp_path: Path) -> None:
    result = bench(str(tmp_path), "--offline")

    assert result.exit_code == ExitCode.FAILED
    assert "config.json" in result.stderr


def test_offline_says_what_hinders_determinism(tiny_backbone_folder: Callable[[str], Path]) -> None:
    result = bench(str(tiny_backbone_folder("gptj")), "--offline", *TINY, "--deterministic")

    assert result.exit_code == ExitCode.USAGE, result.output
    assert "dense path" in result.stderr
    assert "--no-deterministic" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "5", "--concurrency", "5"), "--concurrency"),
        (("--no-prompt", "--zipf", "1"), "--zipf"),
        (("--no-prompt", "--task", "one"), "--task"),
        (("--offline", "--url", "http://x"), "--url"),
        (("--offline", "--task", "one"), "--task"),
        (("--offline", "--vocab-size", "50"), "--vocab-size"),
        (("--profile", "x"), "--profile"),
        (("--num-prompts", "5"), "--num-prompts"),
        (("-k", "5"), "-k"),
        (("model",), "MODEL"),
        (("--max-rows", "5"), "--max-rows"),
        (("--dtype", "float32"), "--dtype"),
        (("--offline", "--max-rows", "0"), "--max-rows"),
        (("--prompt-tokens", "7-5"), "--prompt-tokens"),
        (("--new-tokens", "normal"), "--new-tokens"),
        (("--json", "/no/such/folder/x.json"), "--json"),
        (("--offline", "--profile", "/no/such/folder/x.json"), "--profile"),
        (("--plot", __file__), "--plot"),
        (("--rate", "0"), "--rate"),
        (("--requests", "0"), "--requests"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage_and_named(arguments: tuple[str, ...], says: str) -> None:
    result = bench(*arguments)

    assert result.exit_code == ExitCode.USAGE, result.output
    assert says in result.stderr


def test_variables_of_a_server_do_not_hinder_an_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMPTMUX_URL", "http://localhost:1")
    monkeypatch.setenv("PROMPTMUX_KEY", "secret")

    assert "config.json" in bench(str(tmp_path), "--offline").stderr


def test_settings_of_the_environment_are_those_of_the_engine(
    tiny_backbone_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTMUX_MAX_ROWS", "2")
    report = report_of(bench(str(tiny_backbone_folder("llama")), "--offline", *TINY, *SIZES, "--json", "-"))

    assert report["target"]["engine"]["max_rows"] == 2
    assert report["steps"]["mean_rows"] <= 2
