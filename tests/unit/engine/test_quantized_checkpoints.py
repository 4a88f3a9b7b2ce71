"""Backbones whose checkpoints hold quantised weights: served as transformers reads them, or refused by name."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from tests.factories import CONFIGS, save_tiny_backbone
from tests.unit.engine.stepped import SteppedEngine, make_request

BLOCK = 128
LARGEST_FP8 = 448.0
FIELDS = CONFIGS["llama"] | {"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_key_value_heads": 4}
TOKENS = [5, 9, 14, 3, 77]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone("llama", tmp_path_factory.mktemp("plain") / "llama", config_fields=FIELDS)


def copy_with_config(folder: Path, target: Path, quantization: Mapping[str, Any]) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": dict(quantization)}))
    return target


def in_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of BLOCK by BLOCK numbers as float8, and a scale a block."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST_FP8
    quantised = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantised.view(rows, columns), scales


def widened(quantised: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return quantised.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def test_fp8_weights_are_served_and_are_what_the_file_says(plain: Path, tmp_path: Path) -> None:
    fp8 = copy_with_config(
        plain,
        tmp_path / "fp8",
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        },
    )
    by_hand = tmp_path / "by_hand"
    shutil.copytree(plain, by_hand)
    weights = load_file(plain / "model.safetensors")
    quantised = {name: in_fp8(weight) for name, weight in weights.items() if name.endswith("proj.weight")}
    scales = {f"{name}_scale_inv": scale for name, (_, scale) in quantised.items()}
    held = {name: weight for name, (weight, _) in quantised.items()}
    save_file(weights | held | scales, fp8 / "model.safetensors", metadata={"format": "pt"})
    wide = {name: widened(*both) for name, both in quantised.items()}
    save_file(weights | wide, by_hand / "model.safetensors", metadata={"format": "pt"})

    served, expected = (Backbone.load(str(folder), dtype="float32", device="cpu") for folder in (fp8, by_hand))
    assert served.path == "packed"
    torch.testing.assert_close(served.reference(TOKENS), expected.reference(TOKENS), rtol=1e-3, atol=1e-3)
    found, wanted = (SteppedEngine(b).run(make_request("row", TOKENS, max_tokens=8)) for b in (served, expected))
    assert found.token_ids == wanted.token_ids


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("bitsandbytes", {"load_in_4bit": True}),
        ("gptq", {"bits": 4}),
        ("compressed-tensors", {}),
    ],
)
def test_weights_whose_format_needs_what_is_not_here_are_refused_by_name(
    plain: Path, tmp_path: Path, method: str, fields: dict[str, Any]
) -> None:
    folder = copy_with_config(plain, tmp_path / method, {"quant_method": method, **fields})
    with pytest.raises(BackboneError, match=rf"quantised \({method}\), and that cannot be read here: .*install"):
        Backbone.load(str(folder), dtype="float32", device="cpu")


def test_weights_in_a_format_that_nobody_knows_are_refused(plain: Path, tmp_path: Path) -> None:
    """transformers warns of it and reads the weights as if they were plain."""
    folder = copy_with_config(plain, tmp_path / "new", {"quant_method": "newer-than-us"})
    with pytest.raises(BackboneError, match=r"quantised \(newer-than-us\), which this version of transformers"):
        Backbone.load(str(folder), dtype="float32", device="cpu")
