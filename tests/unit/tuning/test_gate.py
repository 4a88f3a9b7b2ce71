"""A backbone over which packed training is not right is refused before the first step, with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.factories import VOCAB_SIZE
from tuning import attention
from tuning.forward import PackedPass
from tuning.gate import check_backbone
from tuning.records import UnsupportedBackboneError

from .tiny import load_tiny


def make_model(family: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **fields))
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "mixtral", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "gpt_oss"]
)
def test_backbones_that_are_right_pass(family: str, tmp_path: Path) -> None:
    check_backbone(PackedPass(load_tiny(family, tmp_path)))


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_backbones_that_attend_by_themselves_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBackboneError, match="computes attention by itself"):
        PackedPass(load_tiny(family, tmp_path))


def test_backbones_that_pass_what_is_not_known_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny("gemma2", tmp_path)
    monkeypatch.setattr(attention, "_NEUTRAL_KEYWORDS", frozenset())
    with pytest.raises(UnsupportedBackboneError, match=r"the model passes .* to its attention"):
        PackedPass(model)


def test_backbones_that_count_the_columns_of_the_batch_are_refused(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    packed = PackedPass(model)
    setattr(model.model.layers[0].self_attn, "attn_temperature_tuning", True)  # noqa: B010 - as Llama 4 has it
    with pytest.raises(UnsupportedBackboneError, match="by the places of tokens in the batch"):
        check_backbone(packed)


def test_backbones_with_state_across_tokens_are_refused() -> None:
    model = make_model(
        "jamba",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_expand=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    with pytest.raises(UnsupportedBackboneError):
        check_backbone(PackedPass(model))


def test_attention_that_forgets_the_window_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedPass(load_tiny("mistral", tmp_path))
    monkeypatch.setattr(attention, "_Layer", lambda **fields: attention_layer(**(fields | {"window": None})))
    with pytest.raises(UnsupportedBackboneError, match="logits differ from the stock model's"):
        check_backbone(packed)


attention_layer = attention._Layer


@pytest.mark.parametrize("prepare", [lambda m: m.train(), lambda m: m.requires_grad_(True)])
def test_a_backbone_that_is_not_frozen_is_refused(tmp_path: Path, prepare: Any) -> None:
    with pytest.raises(UnsupportedBackboneError, match=r"eval\(\)|requires_grad_"):
        PackedPass(prepare(load_tiny("llama", tmp_path)))


def test_what_a_boundary_raises_is_no_fault_of_the_backbone(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check_backbone(PackedPass(load_tiny("llama", tmp_path), boundary=stop))
