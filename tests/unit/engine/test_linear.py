"""Packed linear layers compute what the model's own do: compared with F.linear, and with whole models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.engine.linear import LinearError, PackedEmbedding, PackedLinear, ProbeError, prepare_linears
from server.engine.packed_weights import (
    NativeProjections,
    PlainProjections,
    Quantization,
    WeightForm,
    fastest_form,
    native_is_usable,
    pack,
    quantize,
    usable_forms,
)
from tests.factories import CONFIGS, VOCAB_SIZE, save_tiny_backbone

FORMS: list[WeightForm] = ["plain", "onednn", "native"]
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require(form: WeightForm, dtype: torch.dtype, quantization: Quantization = "none") -> None:
    if form not in usable_forms(dtype, CPU, quantization):
        pytest.skip(f"this machine has no {form} form for {dtype}, {quantization}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_backbone(family, tmp_path_factory.mktemp(family)) for family in CONFIGS}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(seed))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).square().mean().sqrt() / expected.float().std())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 11, 12, 13, 25, 200])
@pytest.mark.parametrize(("widths", "inputs"), [([64], 48), ([33, 7, 96], 34), ([32, 31], 770)])
def test_siblings_products_are_those_of_f_linear(
    form: WeightForm, num_rows: int, widths: list[int], inputs: int
) -> None:
    require(form, torch.bfloat16)
    weights = [random(width, inputs, seed=i) for i, width in enumerate(widths)]
    biases = [random(width, seed=9 + i) if i != 1 else None for i, width in enumerate(widths)]
    rows = random(num_rows, inputs, seed=5)
    found = pack(form, weights, biases, "none").multiply(rows)
    for answer, weight, bias in zip(found, weights, biases, strict=True):
        expected = F.linear(rows.float(), weight.float(), bias.float() if bias is not None else None)
        assert answer.shape == expected.shape
        assert answer.dtype == torch.bfloat16
        # bf16 keeps 8 bits: half a unit in the last place of the largest numbers, and the joined bias in bf16.
        torch.testing.assert_close(answer.float(), expected, rtol=2e-2, atol=2e-2 * inputs**0.5)
        assert relative(answer, expected) < 4e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1, 4, 5, 13, 40])
def test_int8_products_are_those_of_the_multiplied_out_weights(form: WeightForm, num_rows: int) -> None:
    require(form, torch.bfloat16, "int8")
    weights, bias = [random(40, 64), random(24, 64, seed=1)], random(24, seed=2)
    rows = random(num_rows, 64, seed=3)
    packed = pack(form, weights, [None, bias], "int8")
    found = packed.multiply(rows)
    for place, weight in enumerate(weights):
        kept, scale = quantize(weight)
        expected = F.linear(rows.float(), kept.float() * scale[:, None], bias.float() if place else None)
        assert relative(found[place], expected) < 8e-3
        assert relative(packed.weight(place), weight) < 1e-2


def test_quantize_is_exact_at_the_largest_weight_and_within_half_a_step_elsewhere() -> None:
    weight = random(16, 50, dtype=torch.float32)
    weight[3] = 0.0
    kept, scale = quantize(weight)
    assert kept.abs().max() == 127
    assert ((kept * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()
    assert (kept[3] == 0).all()


def test_native_rows_do_not_depend_to_the_bit_on_what_shares_the_batch() -> None:
    require("native", torch.bfloat16)
    rows = random(230, 576)
    for quantization in ("none", "int8"):
        packed = pack("native", [random(100, 576, seed=1)], [None], quantization)
        together = packed.multiply(rows)[0]
        for count in (1, 2, 5, 12, 13, 64, 193):
            assert torch.equal(packed.multiply(rows[:count])[0], together[:count])
        assert torch.equal(packed.multiply(rows[40:43])[0], together[40:43])


def test_native_takes_rows_of_any_layout() -> None:
    require("native", torch.bfloat16)
    packed = pack("native", [random(64, 32)], [None], "none")
    wide = random(6, 70, seed=1)
    for rows in (wide[:, 2:34], wide[:, 3:35], wide[:, :64:2], random(32, 6, seed=2).t()):
        assert torch.equal(packed.multiply(rows)[0], packed.multiply(rows.contiguous())[0])
    assert packed.multiply(random(2, 3, 32))[0].shape == (2, 3, 64)
    assert packed.multiply(random(0, 32))[0].shape == (0, 64)


def test_native_refuses_rows_that_do_not_fit_its_weights() -> None:
    require("native", torch.bfloat16)
    packed = pack("native", [random(64, 32)], [None], "none")
    with pytest.raises(RuntimeError, match="34 wide, not 32"):
        packed.multiply(random(2, 34))
    with pytest.raises(RuntimeError, match="takes bf16"):
        packed.multiply(random(2, 32, dtype=torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_weight_can_be_read_back(form: WeightForm) -> None:
    require(form, torch.bfloat16)
    weights = [random(33, 34), random(64, 34, seed=1)]
    packed = pack(form, weights, [None, None], "none")
    assert all(torch.equal(packed.weight(place), weight) for place, weight in enumerate(weights))


def test_an_odd_width_is_kept_plain() -> None:
    assert not isinstance(pack("native", [random(32, 33)], [None], "none"), NativeProjections)


def test_the_fastest_form_is_one_of_those_that_were_asked_for() -> None:
    forms = usable_forms(torch.float32, CPU, "none")
    assert fastest_form(forms, [(64, 64)], torch.float32, "none") in forms
    assert fastest_form(["plain"], [(64, 64)], torch.float32, "none") == "plain"


@pytest.mark.parametrize("form", ["plain", "onednn"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_keeps_its_fp32_logits(family: str, form: WeightForm, folders: dict[str, Path]) -> None:
    require(form, torch.float32)
    model = load(folders[family])
    expected = logits(model)
    report = prepare_linears(model, form=form)
    assert relative(logits(model), expected) < 1e-5
    assert report.error < 1e-5
    assert report.num_packed > 0 or form == "plain"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_keeps_its_bf16_logits_within_rounding(family: str, folders: dict[str, Path]) -> None:
    require("native", torch.bfloat16)
    exact = logits(load(folders[family]))
    model = load(folders[family], torch.bfloat16)
    rounding = relative(logits(model), exact)
    prepare_linears(model, form="native")
    assert relative(logits(model), exact) < 1.5 * rounding + 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_int8_stays_near_the_original(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family])
    expected = logits(model)
    report = prepare_linears(model, quantization="int8")
    assert report.quantization == "int8"
    assert 0 < relative(logits(model), expected) < 0.1


def test_projections_of_one_input_are_fused(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    report = prepare_linears(model, form="plain")
    layer: Any = model.get_submodule("model.layers.0")
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.siblings is attention.k_proj.siblings is attention.v_proj.siblings
    assert mlp.gate_proj.siblings is mlp.up_proj.siblings
    assert isinstance(attention.o_proj, nn.Linear)
    assert report.num_fused == 5 * model.config.num_hidden_layers


def test_an_input_changed_between_two_projections_keeps_them_apart() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            one = self.first(rows)
            rows.add_(1)
            return one + self.second(rows)

    model = _as_model(Changing())
    expected = logits(model)
    prepare_linears(model, form="plain")
    assert isinstance(model.get_submodule("block.first"), nn.Linear)
    assert torch.equal(logits(model), expected)


def test_fused_projections_answer_in_any_order_and_again(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    weights = {name: getattr(attention, name).weight.clone() for name in ("q_proj", "k_proj", "v_proj")}
    prepare_linears(model, form="plain")
    rows, others = random(5, 32, dtype=torch.float32), random(5, 32, seed=1, dtype=torch.float32)
    for name, given in [
        ("v_proj", rows), ("v_proj", rows), ("q_proj", others), ("k_proj", rows), ("k_proj", others), ("q_proj", rows),
        ("v_proj", rows), ("q_proj", rows),
    ]:  # fmt: skip
        torch.testing.assert_close(getattr(attention, name)(given), F.linear(given, weights[name]))


def test_answers_left_behind_by_a_failed_pass_are_forgotten(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["llama"])
    prepare_linears(model, form="plain")
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    rows = random(5, 32, dtype=torch.float32)
    attention.q_proj(rows)
    assert attention.k_proj.siblings.answers
    monkeypatch.setattr(model.get_submodule("model"), "forward", _fail)
    with pytest.raises(RuntimeError, match="cut short"):
        logits(model)
    assert not attention.k_proj.siblings.answers
    assert attention.k_proj.siblings.rows is None


def _fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("cut short")


def test_a_tied_head_shares_one_packed_table_with_the_embeddings() -> None:
    require("native", torch.bfloat16)
    model = _tied()
    table: Any = model.get_input_embeddings()
    expected, rows = logits(model), table.weight.detach().clone()
    prepare_linears(model, form="native")
    packed: Any = model.get_input_embeddings()
    assert isinstance(packed, PackedEmbedding)
    assert not any(p.shape == rows.shape for p in model.parameters())
    assert torch.equal(packed(torch.tensor([[0, 5], [31, 127]])), F.embedding(torch.tensor([[0, 5], [31, 127]]), rows))
    assert torch.equal(packed.weight, rows)
    assert relative(logits(model), expected) < 2e-2


def test_int8_leaves_a_tied_table_of_embeddings_whole() -> None:
    model = _tied()
    table: Any = model.get_input_embeddings()
    rows = table.weight.detach().clone()
    prepare_linears(model, quantization="int8")
    kept: Any = model.get_input_embeddings()
    assert torch.equal(kept.weight, rows)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(head, PackedLinear)


def test_the_original_weights_memory_is_given_back(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    projection: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    report = prepare_linears(model, form="onednn")
    assert projection.weight is None
    assert report.num_packed == 7 * model.config.num_hidden_layers + 1


def test_weights_that_multiply_wrongly_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: Any) -> Any:
        packed = pack(*args)
        packed.joined.mul_(1.5)  # type: ignore[operator]
        return packed

    monkeypatch.setattr("server.engine.linear.pack", spoiled)
    with pytest.raises(LinearError, match="differ"):
        prepare_linears(load(folders["llama"]), form="plain")


@pytest.mark.parametrize("spoiled_rows", [1, 6, 30])
def test_products_that_are_wrong_for_one_number_of_rows_alone_are_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, spoiled_rows: int
) -> None:
    multiply = PlainProjections.multiply

    def spoiled(self: PlainProjections, rows: torch.Tensor) -> Any:
        answers = multiply(self, rows)
        return [answer.roll(1, -1) for answer in answers] if rows.shape[-2] == spoiled_rows else answers

    monkeypatch.setattr(PlainProjections, "multiply", spoiled)
    with pytest.raises(LinearError, match="differ"):
        prepare_linears(load(folders["llama"]), form="plain")


def test_rounding_that_the_gate_allows_is_allowed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model's bf16 logits move by more than a shallow one's: 0.04 of their spread were seen at 30 layers."""
    model = load(folders["llama"], torch.bfloat16)
    monkeypatch.setattr("server.engine.linear.relative_difference", lambda found, expected: 0.06)
    assert prepare_linears(model, form="plain").error == 0.06


def test_a_model_that_cannot_be_run_is_told_from_weights_that_cannot_be_packed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["llama"])
    with monkeypatch.context() as broken:
        broken.setattr(model.get_submodule("model"), "forward", _fail)
        with pytest.raises(ProbeError, match="RuntimeError: cut short"):
            prepare_linears(model, form="plain")
    monkeypatch.setattr("server.engine.linear.pack", _fail)
    with pytest.raises(LinearError, match="RuntimeError: cut short"):
        prepare_linears(model, form="plain")


def test_prepare_works_under_inference_mode(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    with torch.inference_mode():
        assert prepare_linears(model, form="plain").num_fused > 0


def test_native_use_follows_the_instructions_of_the_cpu() -> None:
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        assert not native_is_usable()


def _tied() -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], tie_word_embeddings=True)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def _as_model(block: nn.Module) -> PreTrainedModel:
    """The smallest thing that `prepare_linears` takes for a model: ids in, the block's outputs as logits."""

    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Text:
        vocab_size = VOCAB_SIZE

    class Config:
        def get_text_config(self) -> Text:
            return Text()

    class Model(nn.Module):
        dtype, device, config = torch.float32, CPU, Config()

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block, self.table = block, nn.Embedding(VOCAB_SIZE, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Output:
            return Output(self.block(self.table(input_ids).clone()))

    model: Any = Model()
    return model
