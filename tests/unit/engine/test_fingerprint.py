"""The backbone's digest: what it depends on, and what it must not depend on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from server.engine.backbone import Backbone
from server.engine.fingerprint import FingerprintError, fingerprint_folder

Weights = dict[str, torch.Tensor]


def make_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(6, 4, generator=generator),
        "model.layers.0.weight": torch.randn(4, 3, generator=generator).to(torch.bfloat16),
        "model.scale": torch.tensor(0.5),
        "model.none": torch.empty(0, 2),
    }


def save(folder: Path, *files: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, weights in enumerate(files):
        save_file(weights, folder / f"model-{number}.safetensors")
    return folder


def fingerprint(folder: Path, *files: Weights) -> str:
    return fingerprint_folder(save(folder, *files), None)


def expected_fingerprint(weights: Weights) -> str:
    """Name, shape, dtype and bytes of every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


def cache_file(cache_dir: Path) -> Path:
    (file,) = (cache_dir / "fingerprints").iterdir()
    return file


def test_fingerprint_is_the_digest_of_names_shapes_and_bytes(tmp_path: Path) -> None:
    assert fingerprint(tmp_path, make_weights()) == expected_fingerprint(make_weights())


def test_files_into_which_the_weights_are_split_do_not_matter(tmp_path: Path) -> None:
    weights = make_weights()
    halves = [{n: t for i, (n, t) in enumerate(weights.items()) if i % 2 == half} for half in (1, 0)]

    assert fingerprint(tmp_path / "whole", weights) == fingerprint(tmp_path / "split", *halves)


@given(st.integers(0, 6 * 4 * 4 - 1), st.integers(0, 7))
@settings(deadline=None, max_examples=10)
def test_every_bit_matters(tmp_path_factory: pytest.TempPathFactory, byte: int, bit: int) -> None:
    weights = make_weights()
    before = fingerprint(tmp_path_factory.mktemp("before"), weights)
    weights["model.embed.weight"].view(-1).view(torch.uint8)[byte] ^= 1 << bit

    assert fingerprint(tmp_path_factory.mktemp("after"), weights) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"model.embed.weight": w["model.embed.weight"].reshape(4, 6)},
        lambda w: w | {"model.embed.weight": w["model.embed.weight"].view(torch.int32)},
        lambda w: w | {"model.none": torch.empty(2, 0)},
        lambda w: w | {"model.more": torch.zeros(1)},
        lambda w: {n: t for n, t in w.items() if n != "model.scale"},
        lambda w: {n.replace("scale", "scala"): t for n, t in w.items()},
    ],
    ids=["shape", "dtype", "shape of nothing", "one more", "one less", "name"],
)
def test_what_the_weights_are_matters(tmp_path: Path, change: Callable[[Weights], Weights]) -> None:
    changed = change(make_weights())

    assert fingerprint(tmp_path / "a", make_weights()) != fingerprint(tmp_path / "b", changed)


def test_serving_dtype_does_not_matter(tiny_backbone_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_backbone_folder("llama"))
    served = [Backbone.load(folder, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")]

    assert served[0].fingerprint == served[1].fingerprint
    assert served[0].dtype != served[1].dtype


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(FingerprintError, match="pickled weights are never loaded"):
        fingerprint_folder(tmp_path, None)


def test_second_look_is_answered_from_the_cache(tmp_path: Path) -> None:
    folder, cache_dir = save(tmp_path / "model", make_weights()), tmp_path / "cache"
    first = fingerprint_folder(folder, cache_dir)
    assert cache_file(cache_dir).read_text() == first
    # Only a look into the cache can give this answer.
    cache_file(cache_dir).write_text("f" * 64)

    assert fingerprint_folder(folder, cache_dir) == "f" * 64


@pytest.mark.parametrize("remains", ["", "half a dig"])
def test_broken_cache_is_made_again(tmp_path: Path, remains: str) -> None:
    folder, cache_dir = save(tmp_path / "model", make_weights()), tmp_path / "cache"
    first = fingerprint_folder(folder, cache_dir)
    cache_file(cache_dir).write_text(remains)

    assert fingerprint_folder(folder, cache_dir) == first
    assert cache_file(cache_dir).read_text() == first


def test_changed_file_of_the_same_size_is_hashed_again(tmp_path: Path) -> None:
    folder, cache_dir = save(tmp_path / "model", make_weights()), tmp_path / "cache"
    first = fingerprint_folder(folder, cache_dir)
    file = folder / "model-0.safetensors"
    before = file.stat()
    changed = make_weights()
    changed["model.scale"] += 1
    save(folder, changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    assert file.stat().st_size == before.st_size
    assert fingerprint_folder(folder, cache_dir) == expected_fingerprint(changed) != first


def test_one_cache_serves_two_models(tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    other = make_weights() | {"model.scale": torch.tensor(2.0)}
    folders = [save(tmp_path / "a", make_weights()), save(tmp_path / "b", other)]

    for _ in range(2):
        found = [fingerprint_folder(folder, cache_dir) for folder in folders]
        assert found == [expected_fingerprint(make_weights()), expected_fingerprint(other)]


def test_servers_that_start_together_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache_dir = save(tmp_path / "model", make_weights()), tmp_path / "cache"
    replace, found = Path.replace, []

    def replace_after_another_server(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        found.append(fingerprint_folder(folder, cache_dir))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_after_another_server)
    found.append(fingerprint_folder(folder, cache_dir))

    assert found == [expected_fingerprint(make_weights())] * 2
    assert cache_file(cache_dir).read_text() == found[0]
