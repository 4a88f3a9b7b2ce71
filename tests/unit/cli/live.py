"""Commands that are run against a live server, and prompts for it."""

from pathlib import Path

from typer.testing import CliRunner, Result

from server.cli import app
from tests.fakes import make_prompt_config, make_prompt_file
from tests.unit.api.live_server import LiveServer


def call(server: LiveServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", server.url])


def prompt_folder(parent: Path, value: float, *, config: bytes | None = None) -> Path:
    folder = parent / f"prompt-{value}"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(make_prompt_file(value))
    (folder / "adapter_config.json").write_bytes(config if config is not None else make_prompt_config())
    return folder
