"""A saved prompt becomes keys and values that act as it does, and one that does not fit is refused."""

from pathlib import Path

import pytest
import torch

from server.engine.backbone import Backbone
from tests.factories import load_model, save_prompt, save_tiny_backbone
from tuning.prefixes import PrefixError, backbone_shape, load_prefix


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone("llama", tmp_path_factory.mktemp("tiny") / "llama")


def test_shape_is_the_one_that_a_server_finds(tiny: Path) -> None:
    served = Backbone.load(str(tiny), dtype="float32", device="cpu").shape(4096)
    found = backbone_shape(load_model(tiny), name="llama")

    for name in type(found).__slots__:
        wanted = "" if name == "fingerprint" else getattr(served, name)
        assert getattr(found, name) == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted), name


def test_vectors_become_what_they_leave_behind_in_every_layer(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    save_prompt(tiny, "prompt_tuning", 6, tmp_path, seed=1)
    prefix = load_prefix(tmp_path, model, base_model_name="llama")

    assert prefix.num_virtual_tokens == 6
    assert any(warning.startswith("few_virtual_tokens: ") for warning in prefix.warnings)
    cache = prefix.make_cache(3)
    cache.crop(-6)
    # What a pass does to its cache is not done to the prefix.
    assert all(keys.shape[2] == 6 for keys, _ in prefix.layers)
    assert torch.equal(prefix.make_cache(2).layers[1].keys[1], prefix.layers[1][0][0])


def test_prompt_of_another_backbone_or_none_is_refused_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    save_prompt(tiny, "prefix", 4, tmp_path / "prompt", seed=1)
    other = load_model(save_tiny_backbone("gpt2", tmp_path / "gpt2"))

    with pytest.raises(PrefixError, match="prompt_embeddings has shape"):
        load_prefix(tmp_path / "prompt", other, base_model_name="gpt2")
    with pytest.raises(PrefixError, match="cannot be read"):
        load_prefix(tmp_path / "nowhere", other, base_model_name="gpt2")
