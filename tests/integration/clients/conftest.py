from collections.abc import Iterator

import pytest

from tests.integration.clients.tiny_server import TinyServer, tiny_server
from tests.unit.api.conftest import log_lines

__all__ = ["log_lines"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    """One server for all clients."""
    with tiny_server(tmp_path_factory.mktemp("clients")) as server:
        yield server
