"""/metrics on a port of its own, for those who scrape from a network that must not reach the API.

Owns that listener, a thread of prometheus_client's. Refuses to know what is measured.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import Metric, start_http_server
from prometheus_client.registry import Collector

from server.runtime.service import Runtime


class _Current(Collector):
    """The runtime's metrics, the engine's gauges as they are when they are asked for."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterable[Metric]:
        self._runtime.refresh_gauges()
        return self._runtime.metrics.registry.collect()


@contextmanager
def metrics_listener(runtime: Runtime) -> Iterator[int | None]:
    """Listens while inside, where the settings name a port; gives the port. Raises OSError when it is taken."""
    port = runtime.settings.metrics_port
    if port is None:
        yield None
        return
    server, thread = start_http_server(port, runtime.settings.host, registry=_Current(runtime))
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
