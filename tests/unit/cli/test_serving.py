"""serve: what it refuses to bind, and how its process ends on a signal, seen from outside on a real socket."""

import signal
import socket
from pathlib import Path

import httpx
import pytest
import typer

from prompt_store.store import PromptStore
from server.cli.output import ExitCode
from server.cli.serve import bind
from server.loopback import is_loopback
from tests.unit.cli.processes import END_TIMEOUT_S, StartProcess, run_command, start, wait_until_draining

APP = "tests.unit.cli.drainable_app"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_zero(start_process: StartProcess, sig: signal.Signals) -> None:
    process, url = start_process(APP)
    with httpx.Client(base_url=url) as client:
        # An idle connection that stays open must not hold up the end.
        assert client.get("/readyz").status_code == 200
        process.send_signal(sig)
        assert process.wait(END_TIMEOUT_S) == 0


def test_a_thread_that_hangs_does_not_hold_up_the_end(start_process: StartProcess) -> None:
    process, _ = start_process(APP, "--hangs")
    process.send_signal(signal.SIGTERM)

    assert process.wait(END_TIMEOUT_S) == 0


def test_a_reload_of_wrong_settings_does_not_end_it(start_process: StartProcess) -> None:
    process, url = start_process(APP)
    process.send_signal(signal.SIGHUP)
    with httpx.Client(base_url=url, timeout=END_TIMEOUT_S) as client:
        while not client.get("/reloaded").is_success:
            assert process.poll() is None
        assert client.get("/readyz").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(END_TIMEOUT_S) == 0


def test_a_running_stream_finishes_while_new_requests_are_refused(start_process: StartProcess) -> None:
    process, url = start_process(APP)
    with httpx.stream("GET", f"{url}/stream", timeout=END_TIMEOUT_S) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "begun"
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        assert process.poll() is None
        httpx.get(f"{url}/finish")
        assert list(lines) == ["finished"]
    assert process.wait(END_TIMEOUT_S) == 0


def test_a_stream_that_outlasts_the_drain_gets_its_error_event(start_process: StartProcess) -> None:
    process, url = start_process(APP, "--timeout", "0.2")
    with httpx.stream("GET", f"{url}/stream", timeout=END_TIMEOUT_S) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "begun"
        process.send_signal(signal.SIGTERM)
        assert list(lines) == ["error"]
    assert process.wait(END_TIMEOUT_S) == 0


def test_a_second_signal_ends_it_at_once(start_process: StartProcess) -> None:
    process, url = start_process(APP)
    with httpx.stream("GET", f"{url}/stream", timeout=END_TIMEOUT_S) as stream:
        assert next(stream.iter_lines()) == "begun"
        process.send_signal(signal.SIGINT)
        wait_until_draining(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(END_TIMEOUT_S) == 128 + signal.SIGINT


def test_a_backbone_that_does_not_load_ends_the_process_with_the_reason() -> None:
    process = start(APP, "--fail")
    _, stderr = process.communicate(timeout=END_TIMEOUT_S)

    assert process.returncode == ExitCode.FAILED
    assert "error: no such folder: /models/x" in stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_loopback_addresses_count_as_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_binding_wider_without_keys_is_refused_before_anything_is_loaded(tmp_path: Path, host: str) -> None:
    done = run_command("serve", "--host", host, "--port", "0", "--data-dir", str(tmp_path))

    assert done.returncode == ExitCode.DENIED
    assert f"promptmux keys create --scope infer --data {tmp_path}" in done.stderr


def test_binding_wider_with_a_revoked_key_alone_is_no_way_in(tmp_path: Path) -> None:
    # The store says that keys are asked for, also once the last is revoked: nobody gets in, rather than everybody.
    with PromptStore.open(tmp_path) as store:
        key, _ = store.create_key("default", {"infer"})
        store.revoke_key(key.id)
        assert store.has_keys()


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_command("serve", "--port", "0", flag, port, "--data-dir", str(tmp_path))

    assert done.returncode == ExitCode.FAILED
    assert f"{flag} 0" in done.stderr


def test_a_host_that_does_not_resolve_is_wrong_usage() -> None:
    with pytest.raises(typer.Exit) as caught:
        bind("no-such-host.invalid", 0)

    assert caught.value.exit_code == ExitCode.USAGE


def test_port_zero_takes_a_free_one() -> None:
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", 0) as second:
        assert first.getsockname()[1] != second.getsockname()[1]
