"""Files that PEFT itself saves are read to the numbers that PEFT itself would use."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from prompt_store.errors import InvalidConfig, PromptMismatch
from prompt_store.formats import CheckedPrompt, check_file
from prompt_store.manifest import BackboneShape
from tests.unit.prompt_store.prompt_files import BACKBONE

# PEFT 0.21 still asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K = 21

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=64)

SHAPES = {
    "llama": dataclasses.replace(BACKBONE, hidden_size=32, num_layers=3, kv_heads=2, head_dim=8),
    "gpt2": dataclasses.replace(BACKBONE, hidden_size=24, num_layers=2, kv_heads=3, head_dim=8),
}
CONFIGS: dict[str, PretrainedConfig] = {"llama": LLAMA, "gpt2": GPT2}

COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": K}
KINDS: dict[str, Any] = {
    "prompt_tuning": lambda: peft.PromptTuningConfig(**COMMON),
    "p_tuning_mlp": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **COMMON),
    "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_dropout=0.0, **COMMON
    ),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(K)),
        cpt_mask=[1] * K,
        cpt_tokens_type_mask=[1 + i % 4 for i in range(K)],
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **COMMON),
    "prefix": lambda: peft.PrefixTuningConfig(**COMMON),
    "prefix_projection": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **COMMON),
    "cartridge": lambda: peft.CartridgeConfig(num_frozen_tokens=2, **COMMON),
}


def build(family: str, kind: str) -> Any:
    torch.manual_seed(7)
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(CONFIGS[family]), KINDS[kind]())
    with torch.no_grad():
        # Some start at zero or one: numbers that could hide a mistake.
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(model: Any, folder: Path) -> tuple[bytes, bytes]:
    model.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes()


def read(files: tuple[bytes, bytes], shape: BackboneShape, task_index: int | None = None) -> CheckedPrompt:
    return check_file(*files, backbone=shape, task_index=task_index)


def assert_same(values: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the last bits: PEFT runs its encoders once to save and once to answer, with other batch sizes."""
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_file_has_the_numbers_that_peft_uses(family: str, kind: str, tmp_path: Path) -> None:
    model = build(family, kind)
    files = save(model, tmp_path)
    with torch.no_grad():
        if kind == "multitask":
            for task in range(3):
                expected = model.get_prompt(1, torch.tensor([task]))[0].numpy()
                checked = read(files, SHAPES[family], task)
                assert_same(checked.soft_prompt.values, expected)
            return
        prompt = model.get_prompt(1)
    values = read(files, SHAPES[family]).soft_prompt.values
    if kind.startswith(("prefix", "cartridge")):
        expected = np.stack([[layer.keys[0].numpy(), layer.values[0].numpy()] for layer in prompt.layers])
    else:
        expected = prompt[0].numpy()
    assert_same(values, expected)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning_mlp", "prefix_projection", "cartridge"])
def test_file_saved_again_after_loading_reads_the_same(kind: str, tmp_path: Path) -> None:
    files = save(build("llama", kind), tmp_path / "first")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_config(LLAMA), str(tmp_path / "first"))
    again = save(loaded, tmp_path / "second")
    first, second = read(files, SHAPES["llama"]), read(again, SHAPES["llama"])
    np.testing.assert_array_equal(first.soft_prompt.values, second.soft_prompt.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix"])
def test_half_precision_files_are_read_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("llama", kind)
    model.prompt_encoder.to(dtype)
    stored = next(model.prompt_encoder.parameters()).detach().float().numpy()
    values = read(save(model, tmp_path), SHAPES["llama"]).soft_prompt.values
    if kind == "prefix":
        stored = stored.reshape(K, 3, 2, 2, 8).transpose(1, 2, 3, 0, 4)
    np.testing.assert_array_equal(values, stored)


def test_manifest_tells_kind_and_size(tmp_path: Path) -> None:
    files = save(build("llama", "prefix"), tmp_path)
    checked = read(files, SHAPES["llama"])
    assert (checked.peft_type, checked.kind, checked.num_virtual_tokens) == ("PREFIX_TUNING", "prefix", K)
    assert checked.num_bytes == len(files[0])
    assert checked.prefix_key.startswith(checked.digest)


@pytest.mark.parametrize("kind", ["prompt_tuning", "multitask", "prefix", "cartridge"])
def test_prompt_of_another_backbone_is_refused(kind: str, tmp_path: Path) -> None:
    # The prefixes of these two happen to have the same shape in the file: the configuration tells them apart.
    files = save(build("gpt2", kind), tmp_path)
    with pytest.raises(PromptMismatch, match=r"needs|has 3"):
        read(files, SHAPES["llama"], 0 if kind == "multitask" else None)


def test_encoder_decoder_prompt_is_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=K, num_transformer_submodules=2)
    config.save_pretrained(str(tmp_path))
    with pytest.raises(InvalidConfig) as caught:
        read((b"", (tmp_path / "adapter_config.json").read_bytes()), SHAPES["llama"])
    assert caught.value.param == "config.task_type"


def test_lora_is_refused_by_name(tmp_path: Path) -> None:
    peft.LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    with pytest.raises(InvalidConfig, match="LORA") as caught:
        read((b"", (tmp_path / "adapter_config.json").read_bytes()), SHAPES["llama"])
    assert caught.value.param == "config.peft_type"
