"""A real server over a tiny random backbone that makes prompts, asked by OpenAI's own client."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from server.app import create_app
from server.runtime.service import Runtime
from server.settings import Settings
from tests.factories import CONFIGS, save_tiny_backbone
from tests.integration.clients.tiny_server import make_byte_tokenizer
from tests.unit.api.conftest import log_lines
from tests.unit.api.live_server import serving

__all__ = ["log_lines"]

T = TypeVar("T")

ENDED = ("succeeded", "failed", "cancelled")
TIMEOUT_S = 60.0
EXAMPLES = [{"prompt": f"{n}?", "completion": " yes" if n % 2 else " no"} for n in range(12)]


def to_lines(examples: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


@dataclass(frozen=True, slots=True)
class TrainingServer:
    """`runtime` is None for a server in another process."""

    url: str
    backbone: str
    runtime: Runtime | None = None

    @property
    def app_runtime(self) -> Runtime:
        assert self.runtime is not None
        return self.runtime

    def client(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)

    def upload(self, examples: list[dict[str, Any]] | None = None, key: str = "unused") -> str:
        with self.client(key) as client:
            data = to_lines(EXAMPLES if examples is None else examples)
            return client.files.create(file=("examples.jsonl", data), purpose="fine-tune").id

    def create(self, key: str = "unused", **options: Any) -> FineTuningJob:
        """A job over the usual examples; `options` are those of `promptmux`."""
        with self.client(key) as client:
            return client.fine_tuning.jobs.create(
                model=self.backbone,
                training_file=self.upload(key=key),
                extra_body={"promptmux": {"num_virtual_tokens": 3, "num_steps": 6, "seed": 3, **options}},
            )

    def wait(self, job_id: str, key: str = "unused") -> FineTuningJob:
        """The job once it has ended."""
        with self.client(key) as client:
            return wait_until(
                lambda: job if (job := client.fine_tuning.jobs.retrieve(job_id)).status in ENDED else None
            )

    def say(self, model: str, prompt: str = "3?", **fields: Any) -> str:
        with self.client() as client:
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, **fields)
        return answer.choices[0].text

    def metric(self, name: str, **labels: str) -> float:
        return self.app_runtime.metrics.registry.get_sample_value(f"promptmux_{name}", labels) or 0.0


def wait_until(look: Callable[[], T | None]) -> T:
    """Polls what no event tells of; fails when it does not come."""
    deadline = time.monotonic() + TIMEOUT_S
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return found


@contextmanager
def training_server(model: Path, data_dir: Path, **settings: Any) -> Iterator[TrainingServer]:
    app = create_app(
        Settings(
            **{
                "model": str(model),
                "dtype": "float32",
                "device": "cpu",
                "compile": "off",
                "max_virtual_tokens": 16,
                "data_dir": data_dir,
                "allow_training": "on",
                **settings,
            }
        )
    )
    with serving(app) as (_, port):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: True if httpx.get(f"{url}/readyz").status_code == 200 else None)
        yield TrainingServer(url, model.name, app.state.runtime)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_backbone(
        "llama", tmp_path_factory.mktemp("model") / "tiny", config_fields=CONFIGS["llama"] | {"vocab_size": 263}
    )
    make_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """One for all tests that leave it as it was."""
    with training_server(model, tmp_path_factory.mktemp("training")) as found:
        yield found
