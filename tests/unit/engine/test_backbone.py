"""Which models are served, in which way, and which are turned away with which reason."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5Model

from server.engine.attention import ATTENTION_NAME, StepContext, packed_attention
from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from tests.factories import CONTEXT_LENGTH, HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, load_model, make_tokenizer

FolderOf = Callable[[str], Path]


def load(folder: Path, **kwargs: Any) -> Backbone:
    return Backbone.load(str(folder), **({"dtype": "float32", "device": "cpu"} | kwargs))


@pytest.fixture
def folder(tiny_backbone_folder: FolderOf, tmp_path: Path) -> Path:
    """A llama's folder that the test may spoil."""
    return Path(shutil.copytree(tiny_backbone_folder("llama"), tmp_path / "spoilt"))


def make_model(model_type: str, **kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, eos_token_id=2, pad_token_id=0, **kwargs)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_backbone(model: PreTrainedModel) -> Backbone:
    return Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "packed"), ("gemma2", "packed"), ("gpt2", "packed"), ("gpt_oss", "packed"), ("opt", "packed"),
        ("gptj", "dense"), ("bloom", "dense"), ("falcon", "dense"),
    ],
)  # fmt: skip
def test_model_is_served_in_the_way_that_is_right(tiny_backbone_folder: FolderOf, family: str, path: str) -> None:
    backbone = load(tiny_backbone_folder(family))
    row = [7, 90, 33, 2]

    assert backbone.path == path
    assert backbone.gate.passed
    assert len(backbone.layers) == NUM_LAYERS
    with torch.inference_mode():
        expected = load_model(tiny_backbone_folder(family))(torch.tensor([row])).logits[0]
    torch.testing.assert_close(backbone.reference(row), expected, atol=1e-4, rtol=1e-4)


def test_dense_path_is_taken_with_a_warning_that_says_why(
    tiny_backbone_folder: FolderOf, caplog: pytest.LogCaptureFixture
) -> None:
    load(tiny_backbone_folder("gptj"), name="old one")

    messages = [r.getMessage() for r in caplog.records if r.name == "server.engine.backbone"]
    assert messages == [
        "backbone old one is not served packed: gptj does not use transformers' attention interface",
    ]


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
        (
            "jamba",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 32,
                "num_experts": 2,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "use_mamba_kernels": False,
            },
        ),
    ],
)
def test_model_with_state_outside_attention_is_refused_with_both_reasons(
    model_type: str, kwargs: dict[str, Any]
) -> None:
    with pytest.raises(BackboneError) as refused:
        make_backbone(make_model(model_type, **kwargs))

    message = str(refused.value)
    assert f"({model_type}) is refused. Packed: " in message
    assert "Dense: the model keeps other state than keys and values a layer" in message


@pytest.fixture
def sabotage() -> Iterator[Callable[[Callable[..., Any]], None]]:
    yield lambda function: AttentionInterface.register(ATTENTION_NAME, function)
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def test_model_whose_packed_attention_is_wrong_is_served_dense_and_right(
    tiny_backbone_folder: FolderOf, sabotage: Callable[[Callable[..., Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    sabotage(lambda module, query, *args, **kwargs: packed_attention(module, query * 1.2, *args, **kwargs))
    backbone = load(tiny_backbone_folder("llama"))

    assert backbone.path == "dense"
    assert "packed rows differ from rows alone" in caplog.text
    with torch.inference_mode():
        expected = load_model(tiny_backbone_folder("llama"))(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(backbone.reference([5, 6, 7]), expected, atol=1e-4, rtol=1e-4)


def test_layer_that_bypasses_the_attention_function_is_noticed(
    tiny_backbone_folder: FolderOf, sabotage: Callable[[Callable[..., Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    def uncounted(module: Any, *args: Any, **kwargs: Any) -> Any:
        answers = packed_attention(module, *args, **kwargs)
        context: StepContext = module.promptmux_context
        if context.layer_of[id(module)] == 1:
            context.num_calls -= 1
        return answers

    sabotage(uncounted)
    backbone = load(tiny_backbone_folder("llama"))

    assert backbone.path == "dense"
    assert "attention was called 10 times, not 15" in caplog.text


def test_backbone_is_frozen(llama: Backbone) -> None:
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert not any(module.training for module in llama.model.modules())
    assert not llama.reference([1, 2, 3]).requires_grad


def test_shape_says_what_a_prompt_must_fit(llama: Backbone, tiny_backbone_folder: FolderOf) -> None:
    shape = llama.shape(max_virtual_tokens=40)

    assert (shape.hidden_size, shape.num_layers, shape.kv_heads, shape.head_dim) == (HIDDEN_SIZE, NUM_LAYERS, 2, 8)
    assert (shape.dtype, shape.max_virtual_tokens, shape.model_type) == ("float32", 40, "llama")
    assert shape.fingerprint == llama.fingerprint
    assert shape.name == tiny_backbone_folder("llama").name
    assert llama.bytes_per_token == NUM_LAYERS * 2 * 2 * 8 * 4


def test_layers_that_differ_take_no_prefixes() -> None:
    model = make_model(
        "deepseek_v3", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=1,
    )  # fmt: skip
    backbone = make_backbone(model)

    assert backbone.path == "packed"
    assert (backbone.layers[0].key_dim, backbone.layers[0].value_dim) == (16, 12)
    shape = backbone.shape(40)
    assert (shape.kv_heads, shape.head_dim) == (None, None)


@pytest.mark.parametrize(("wanted", "expected"), [(None, CONTEXT_LENGTH), (100, 100), (10**6, CONTEXT_LENGTH)])
def test_context_is_the_models_unless_less_is_wanted(
    tiny_backbone_folder: FolderOf, wanted: int | None, expected: int
) -> None:
    assert load(tiny_backbone_folder("llama"), max_model_len=wanted).max_model_len == expected


def test_every_eos_that_the_model_names_ends_a_row(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"eos_token": "<unk>"}))

    assert load(folder).eos_token_ids == {2, 17, 3}


def test_reference_leaves_the_packed_path_in_place_also_when_it_fails(llama: Backbone) -> None:
    with pytest.raises(IndexError):
        llama.reference([VOCAB_SIZE + 1])

    assert llama.model.config._attn_implementation == ATTENTION_NAME
    assert llama.path == "packed"


def test_half_precision_is_served_where_it_is_asked_for(tiny_backbone_folder: FolderOf) -> None:
    backbone = load(tiny_backbone_folder("llama"), dtype="bfloat16")

    assert (backbone.dtype, backbone.dtype_name, backbone.path) == (torch.bfloat16, "bfloat16", "packed")
    assert backbone.reference([1, 2]).dtype == torch.bfloat16


def spoil_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: spoil_config(f, auto_map={"AutoModel": "code.Model"}), "auto_map"),
        (lambda f: spoil_config(f, model_type="nonesuch"), "nonesuch"),
        (lambda f: spoil_config(f, intermediate_size=32), "could not be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors"),
        (drop_weight, "its weights lack model.layers.1.mlp.up_proj.weight"),
        (truncate_weights, "could not be loaded"),
        (remove_tokenizer, "could not be loaded"),
    ],
    ids=[
        "shipped code", "unknown architecture", "other shapes", "broken config", "no config", "pickled weights",
        "missing weight", "truncated weights", "no tokenizer",
    ],
)  # fmt: skip
def test_unfit_folder_is_refused_with_the_reason(folder: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(folder)
    with pytest.raises(BackboneError, match=reason):
        load(folder)


def test_shipped_code_is_refused_before_anything_is_loaded(folder: Path) -> None:
    spoil_config(folder, auto_map={"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "configuration.py").write_text("raise SystemExit('shipped code was run')")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="ships its own code"):
        load(folder)


def test_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(BackboneError, match="encoder-decoder"):
        load(tmp_path / "t5")


@pytest.mark.parametrize(
    ("source", "reason"), [("./nowhere", "not a model folder"), ("nobody/nothing", "neither a folder nor a hub id")]
)
def test_unknown_source_is_refused(source: str, reason: str) -> None:
    with pytest.raises(BackboneError, match=reason):
        Backbone.load(source)


def test_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(BackboneError, match="not a model folder"):
        Backbone.load(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("choice", [{"dtype": "float8"}, {"device": "toaster"}])
def test_unknown_dtype_or_device_is_refused_by_name(folder: Path, choice: dict[str, str]) -> None:
    (value,) = choice.values()
    with pytest.raises(BackboneError, match=f"unknown .*{value}"):
        load(folder, **choice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(folder: Path) -> None:
    with pytest.raises(BackboneError, match="no CUDA device"):
        load(folder, device="cuda")
