import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.unit.api.live_server import LiveServer, running_server


@pytest.fixture(scope="session", autouse=True)
def log_lines() -> Iterator[io.StringIO]:
    """All log lines as JSON. Structlog's own default draws tracebacks with all local variables: that takes seconds."""
    stream = io.StringIO()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    yield stream
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server a test module, with the tasks `capital` (two versions) and `german`."""
    with running_server(tmp_path_factory.mktemp("data")) as live:
        assert live.upload("capital", 0.1).status_code == 201
        assert live.upload("capital", 0.2).status_code == 201
        assert live.upload("german", 0.3).status_code == 201
        yield live


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"
