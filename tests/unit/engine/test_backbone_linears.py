"""What a backbone makes of weights that cannot be packed, and of a model that cannot be run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from server.engine.packed_weights import Projections, WeightForm, pack


@pytest.fixture
def folder(tiny_backbone_folder: Callable[[str], Path]) -> Path:
    return tiny_backbone_folder("llama")


def _fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("cut short")


def test_backbone_whose_weights_cannot_be_packed_is_served_as_it_is_stored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoiled(form: WeightForm, weights: Sequence[torch.Tensor], *rest: Any) -> Projections:
        return pack(form, [3 * weight for weight in weights], *rest)

    expected = Backbone.load(str(folder), dtype="float32", device="cpu").reference([5, 6, 7])
    monkeypatch.setattr("server.engine.linear.pack", spoiled)
    backbone = Backbone.load(str(folder), dtype="float32", device="cpu")
    assert backbone.path == "packed"
    assert backbone.linears is None
    torch.testing.assert_close(backbone.reference([5, 6, 7]), expected)
    assert "stay as they are" in caplog.text
    with pytest.raises(BackboneError, match=r"int8.* differ"):
        Backbone.load(str(folder), dtype="float32", device="cpu", quantization="int8")


def test_backbone_that_cannot_be_run_is_refused_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", _fail)
    with pytest.raises(BackboneError, match="cannot be run: RuntimeError: cut short"):
        Backbone.load(str(folder), dtype="float32", device="cpu")


def test_int8_on_another_device_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.backbone.load_folder", _fail)
    with pytest.raises(BackboneError, match="int8 is for backbones on the CPU, not on meta"):
        Backbone.load(str(folder), dtype="float32", device="meta", quantization="int8")
