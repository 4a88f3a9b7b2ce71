"""Logs: one JSON line an event, no prompt, no key, and nothing that a client sends can forge a line."""

import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from server.logs import AccessLine, configure_logging, log_access

SECRET = "pm_Zk3v9Qx7Lr2Tn8Wb5Yc1Hd6Mf4Pg0Sj_-abc"
LINE = AccessLine(
    request_id="req-1",
    method="POST",
    endpoint="/v1/completions",
    status=200,
    e2e_ms=12.34567,
    tenant="default",
    task="country-capital",
    digest="ab" * 32,
    prompt_tokens=5,
    completion_tokens=7,
    queue_ms=0.5,
    ttft_ms=4.0,
    finish_reason="stop",
)


@pytest.fixture
def restore_logging() -> Iterator[None]:
    """Gives the process its loggers back, as other tests found them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    was_configured, config = structlog.is_configured(), structlog.get_config()
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**config)


@pytest.fixture
def stream(restore_logging: None) -> io.StringIO:
    return io.StringIO()


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_access_line_is_one_json_object_with_the_documented_fields(stream: io.StringIO) -> None:
    configure_logging("json", stream=stream)
    log_access(LINE)

    (event,) = events(stream)

    assert event["event"] == "request"
    assert event["e2e_ms"] == 12.346
    expected = {field.name for field in dataclasses.fields(AccessLine)} - {"error_code"}
    assert set(event) == expected | {"event", "level", "logger", "timestamp"}


def test_access_line_has_no_room_for_prompt_text_or_keys() -> None:
    assert {field.name for field in dataclasses.fields(AccessLine)} == {
        "request_id",
        "method",
        "endpoint",
        "status",
        "e2e_ms",
        "tenant",
        "task",
        "digest",
        "prompt_tokens",
        "completion_tokens",
        "queue_ms",
        "ttft_ms",
        "finish_reason",
        "error_code",
    }


@pytest.mark.parametrize(("status", "level"), [(200, "info"), (404, "info"), (503, "info"), (500, "error")])
def test_level_follows_the_status(stream: io.StringIO, status: int, level: str) -> None:
    configure_logging("json", stream=stream)
    log_access(dataclasses.replace(LINE, status=status))

    assert events(stream)[0]["level"] == level


def test_probes_are_written_only_when_asked_for_or_broken(stream: io.StringIO) -> None:
    probe = dataclasses.replace(LINE, endpoint="/readyz")
    configure_logging("json", stream=stream)
    log_access(probe)
    log_access(dataclasses.replace(probe, status=503))
    assert events(stream) == []
    log_access(dataclasses.replace(probe, status=500))
    assert [event["level"] for event in events(stream)] == ["error"]

    configure_logging("json", "debug", stream=stream)
    log_access(probe)
    assert events(stream)[1]["level"] == "debug"


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_keys_are_blotted_out_wherever_they_turn_up(stream: io.StringIO, log_format: Any) -> None:
    configure_logging(log_format, stream=stream)
    log = structlog.get_logger("promptmux.test")
    log.info(f"got {SECRET}", key=SECRET, nested={"list": [SECRET, (SECRET,)]}, other=Exception(SECRET))
    logging.getLogger("uvicorn.error").warning("header Authorization: Bearer %s", "some-other-token")
    try:
        raise ValueError(f"bad key {SECRET}")
    except ValueError:
        log.exception("failed")

    written = stream.getvalue()

    assert "failed" in written
    assert "ValueError" in written
    assert SECRET not in written
    assert SECRET[3:20] not in written
    assert "some-other-token" not in written


def test_tracebacks_hold_no_local_variables(stream: io.StringIO) -> None:
    configure_logging("human", stream=stream)

    def generate(prompt: str) -> None:
        raise RuntimeError(f"length {len(prompt)}")

    try:
        generate("the " + "private " + "words")
    except RuntimeError:
        structlog.get_logger("promptmux.test").exception("step failed")

    assert "RuntimeError: length 17" in stream.getvalue()
    assert "the private words" not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_line_breaks_and_escapes_in_values_forge_no_line(stream: io.StringIO, log_format: Any) -> None:
    configure_logging(log_format, stream=stream)
    forged = "x\n12:00:00 [info] forged\r\x1b[2J\u2028"
    log_access(dataclasses.replace(LINE, task=forged))
    logging.getLogger("some.library").warning("cannot read %s", forged)

    written = stream.getvalue()

    assert len(written.splitlines()) == 2
    assert "\x1b[2J" not in written


def test_uvicorn_and_warnings_are_written_the_same_way(stream: io.StringIO) -> None:
    configure_logging("json", stream=stream)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.error").warning("Unsupported upgrade from [%d]", 7, extra={"color_message": "x"})
    logging.getLogger("uvicorn.access").info('127.0.0.1 - "GET /v1/models?secret=1"')
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)

    unsupported, careful = events(stream)

    assert unsupported["event"] == "Unsupported upgrade from [7]"
    assert "color_message" not in unsupported
    assert "careful" in careful["event"]


def test_level_filters_both_kinds_of_logger(stream: io.StringIO) -> None:
    configure_logging("json", "warning", stream=stream)
    structlog.get_logger("promptmux.test").info("quiet")
    logging.getLogger("some.library").info("quiet")
    structlog.get_logger("promptmux.test").warning("loud")

    assert [event["event"] for event in events(stream)] == ["loud"]


def test_auto_is_human_on_a_terminal_and_json_elsewhere(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging("auto", stream=stream)
    log_access(LINE)
    assert events(stream)

    monkeypatch.setattr(stream, "isatty", lambda: True)
    configure_logging("auto", stream=stream)
    log_access(LINE)
    assert not stream.getvalue().splitlines()[1].startswith("{")
