"""What the server writes down: JSON lines for machines, or a plain format for eyes on a terminal.

Owns the set-up of structlog and of the standard library's loggers (uvicorn's included), the one access line a request
ends with, and the rule that neither prompts nor keys are ever written: an access line has the fields of `AccessLine`
and no others, and whatever looks like one of our keys is blotted out of every other line. Refuses to know HTTP.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import structlog

_SECRET = re.compile(r"pm_[A-Za-z0-9_-]{16,}|(?i:bearer)\s+\S+")
_BLOT = "[hidden]"
# Line breaks and terminal escapes in logged values must not draw lines that we did not write.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

# uvicorn's own access line would be a second one, with the raw path and query string in it.
_SILENCED = ("uvicorn.access",)
_QUIET = ("httpx", "httpcore", "asyncio", "urllib3", "filelock", "alembic", "uvicorn.error")
# Asked every few seconds by machines: their lines would bury all others.
_PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessLine:
    """All that is written about a finished request. Times in milliseconds; what does not apply is None.

    `endpoint` is the route template, never the raw path; `task` and `digest` name the prompt that answered (the first
    of several). `queue_ms` and `ttft_ms` run from the request's arrival to its first row's admission and first token.
    """

    request_id: str
    method: str
    endpoint: str
    status: int
    e2e_ms: float
    tenant: str | None = None
    task: str | None = None
    digest: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    finish_reason: str | None = None
    error_code: str | None = None


def log_access(line: AccessLine) -> None:
    """Writes the one line of a finished request; fields that are None are left out. Probes are written at `debug`."""
    fields = {name: _round(value) for name, value in dataclasses.asdict(line).items() if value is not None}
    structlog.get_logger("promptmux.access").log(_access_level(line), "request", **fields)


def configure_logging(
    log_format: Literal["auto", "json", "human"] = "auto", log_level: str = "info", *, stream: TextIO | None = None
) -> None:
    """Routes structlog and the standard library's loggers to one stream (stderr). Called once, before the app is made.

    `log_format` "auto" is human on a terminal and JSON otherwise. Tracebacks show code lines, never local variables:
    those hold prompts.
    """
    target = stream if stream is not None else sys.stderr
    human = log_format == "human" or (log_format == "auto" and target.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if human else "iso", utc=not human),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
        _blot_secrets,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=target.isatty()) if human else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(target) if stream is not None else _CurrentStderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_drop_uvicorn_colour, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([_strip_control] if human else []),
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for name in _SILENCED:
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = False
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: a progress display takes it over, to keep lines apart from its own."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _access_level(line: AccessLine) -> int:
    if line.status >= 500 and line.status != 503:
        return logging.ERROR
    return logging.DEBUG if line.endpoint in _PROBES else logging.INFO


def _round(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def _blot(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRET.sub(_BLOT, value)
    if isinstance(value, int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(name): _blot(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_blot(item) for item in value]
    return _SECRET.sub(_BLOT, repr(value))


def _blot_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # Names with an underscore are the formatter's own, and are removed before anything is written.
    for name, value in event.items():
        if not name.startswith("_"):
            event[name] = _blot(value)
    return event


def _strip_control(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            escaped = _CONTROL.sub(lambda match: repr(match[0])[1:-1], value)
            event[name] = escaped if name == "exception" else escaped.replace("\n", "\\n")
    return event


def _drop_uvicorn_colour(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.pop("color_message", None)
    return event
