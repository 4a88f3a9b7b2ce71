"""Code that comes with a model or its tokenizer is never run, and nobody is asked whether it should be."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from tests.factories import save_tiny_backbone


class NobodyThere:
    """A terminal that must not be read."""

    def readline(self) -> str:
        raise AssertionError("the terminal was asked")


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("config.json", {"AutoConfig": "shipped.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["shipped.Tokenizer", None]}),
    ],
)
def test_code_shipped_with_model_or_tokenizer_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, auto_map: dict[str, object]
) -> None:
    folder = save_tiny_backbone("llama", tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "shipped.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {"auto_map": auto_map, "tokenizer_class": "Tokenizer"}))
    monkeypatch.setattr(sys, "stdin", NobodyThere())

    with pytest.raises(BackboneError, match=f"ships its own code .auto_map in {file}"):
        Backbone.load(str(folder), dtype="float32", device="cpu")
    assert not ran.exists()


def test_tokenizer_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_backbone("llama", tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"tokenizer_config\.json is not JSON"):
        Backbone.load(str(folder), dtype="float32", device="cpu")


def test_folder_that_ships_no_code_is_served(tiny_backbone_folder: Callable[[str], Path]) -> None:
    """The healthy case, so that a refusal of everything would be noticed."""
    assert Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu").path == "packed"
