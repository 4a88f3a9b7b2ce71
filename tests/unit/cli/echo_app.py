"""A process for the tests of signals: the real app and runtime, served by `DrainingServer`, over the echo engine.

    python -m tests.unit.cli.echo_app DATA_DIR DRAIN_TIMEOUT_S

The engine takes 20 ms a token, so that a stream is long enough to be interrupted. SIGUSR1 ends it with an exception.
"""

import signal
import sys
from pathlib import Path

from server.app import create_app
from server.cli.draining import DrainingServer
from server.cli.serve import bind
from server.metrics import Metrics
from server.runtime.protocols import LoadPrompt
from server.settings import Settings
from tests.fakes import EchoEngine, EchoServerParts

FAILURE_GRACE_S = 1.0


class SlowParts(EchoServerParts):
    def make_engine(
        self, backbone: object, settings: Settings, metrics: Metrics, load_prompt: LoadPrompt
    ) -> EchoEngine:
        engine = super().make_engine(backbone, settings, metrics, load_prompt)
        engine.step_s = 0.02
        return engine


def main(data_dir: str, drain_timeout_s: str) -> int:
    settings = Settings(
        port=0, data_dir=Path(data_dir), drain_timeout_s=float(drain_timeout_s), failure_grace_s=FAILURE_GRACE_S
    )
    parts = SlowParts()

    def crash(*_: object) -> None:
        assert parts.engine is not None
        parts.engine.crash("boom")

    signal.signal(signal.SIGUSR1, crash)
    app = create_app(settings, load_backbone=parts.load_backbone, make_engine=parts.make_engine)
    return DrainingServer(app, settings).serve_on(bind("127.0.0.1", 0))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
