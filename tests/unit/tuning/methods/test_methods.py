"""Every method's files are PEFT's own, load in PEFT unchanged, and give PEFT the outputs they were trained to."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.factories import make_tokenizer
from tests.unit.tuning.tiny import FAMILIES, load_tiny, make_examples, make_run, make_task
from tuning.config import Method
from tuning.forward import PackedPass
from tuning.methods import PromptBuilder, save_peft_files
from tuning.packing import example_row, pack
from tuning.trainer import Trainer

METHODS: tuple[Method, ...] = get_args(Method)
K = 4

# PEFT 0.21 asks transformers for a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def peft_model(base: PreTrainedModel, method: Method) -> peft.PeftModel:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": K}
    made: dict[Method, Any] = {
        "prompt_tuning": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **common),
        "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=24, **common),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=24, **common),
        "p_tuning_v2": lambda: peft.PrefixTuningConfig(**common),
        "cartridge": lambda: peft.CartridgeConfig(**common),
    }
    model: peft.PeftModel = peft.get_peft_model(copy.deepcopy(base), made[method]())
    return model


def train(model: PreTrainedModel, method: Method, folder: Path) -> Path:
    fields = {"encoder_hidden_size": 24} if method in ("p_tuning", "prefix_tuning") else {}
    task = make_task("made", method, num_virtual_tokens=K, num_steps=3, **fields)
    trainer = Trainer(model, make_tokenizer(), [task], run=make_run(), folder=folder, base_model_name="tiny")
    return trainer.run()["made"].folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_give_peft_the_outputs_that_they_were_trained_to(family: str, method: Method, tmp_path: Path) -> None:
    model = load_tiny(family, tmp_path)
    folder = train(model, method, tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    packed = PackedPass(model)
    prompt = PromptBuilder(packed, make_tokenizer()).build(make_task("made", method, num_virtual_tokens=K))
    flat = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    values = prompt.values(flat, packed.dtype)
    examples = make_examples(3, seed=7)
    batch = pack([example_row(0, example) for example in examples], [prompt.slot], packed.device)
    with torch.no_grad(), packed.logits(batch, [values]) as logits:
        found = logits
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    for row, example in enumerate(examples):
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids[:-1]]])
        with torch.no_grad():
            expected = loaded(input_ids=ids).logits[0, -len(example.completion_ids) :]
        torch.testing.assert_close(found[batch.target_rows == row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_configuration_and_tensors_are_those_that_peft_saves(family: str, method: Method, tmp_path: Path) -> None:
    model = load_tiny(family, tmp_path)
    folder = train(model, method, tmp_path / "run")
    oracle = peft_model(model, method)
    oracle.save_pretrained(str(tmp_path / "oracle"))
    found, expected = (json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "oracle"))
    expected["base_model_name_or_path"] = "tiny"
    assert found == expected
    saved = [load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "oracle")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[1].items():
        assert (saved[0][name].shape, saved[0][name].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_reparametrisations_begin_as_pefts_do_under_the_same_seed(method: Method, tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    task = make_task("made", method, num_virtual_tokens=K, seed=11, encoder_hidden_size=24)
    prompt = PromptBuilder(PackedPass(model), make_tokenizer()).build(task)
    torch.manual_seed(11)
    oracle = peft_model(model, method)
    encoder: Any = oracle.prompt_encoder["default"]
    assert torch.equal(prompt.tensors()["prompt_embeddings"], encoder(torch.arange(K)))


def test_torchs_own_randomness_is_left_alone(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for method in METHODS:
        train(model, method, tmp_path / method)
    assert torch.equal(torch.rand(3), expected)


def test_a_cartridge_keeps_its_first_token(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    packed = PackedPass(model)
    before = PromptBuilder(packed, make_tokenizer()).build(make_task("made", "cartridge", num_virtual_tokens=K))
    folder = train(model, "cartridge", tmp_path / "run")
    after = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    start = before.tensors()["prompt_embeddings"]
    moved = (after != start).any(dim=1).tolist()
    assert moved == [False, True, True, True]


def test_a_prompt_that_half_precision_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    tensors = {"prompt_embeddings": torch.full((1, 2), 1e6)}
    with pytest.raises(ValueError, match=r"prompt_embeddings is not finite as torch\.float16"):
        save_peft_files(tmp_path / "prompt", config, tensors, torch.float16)
    assert not (tmp_path / "prompt").exists()
