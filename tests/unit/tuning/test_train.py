"""Training lowers the loss, touches nothing but the prompt, and saves what PEFT loads."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tuning.data import Dataset, Method, worked_examples
from tuning.train import StepReport, TrainConfig, TrainResult, attach_prompt, completion_loss, save_prompt, train_prompt

from .conftest import make_spec

# PEFT 0.21 asks transformers for a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

METHODS: tuple[Method, ...] = ("prompt_tuning", "prefix_tuning")


def tune(
    method: Method, dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **config: int
) -> TrainResult:
    return train_prompt(
        make_spec(method), dataset, backbone, tokenizer, config=TrainConfig(**config), base_model_name="tiny"
    )


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_leaves_the_backbone_alone(
    method: Method, dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = copy.deepcopy(backbone.state_dict())
    result = tune(method, dataset, backbone, tokenizer, num_steps=120)
    assert len(result.losses) == 120
    assert sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])
    after = result.model.get_base_model().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_losses_and_another_seed_others(
    method: Method, dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    runs = [tune(method, dataset, backbone, tokenizer, num_steps=3, seed=seed).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_each_step_is_reported(dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    steps: list[StepReport] = []
    config = TrainConfig(num_steps=4, batch_size=7)
    result = train_prompt(
        make_spec(), dataset, backbone, tokenizer, config=config, base_model_name="tiny", report=steps.append
    )
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert [step.loss for step in steps] == list(result.losses)
    assert {(step.num_steps, step.num_examples) for step in steps} == {(4, 7)}


@pytest.mark.parametrize(("method", "dtype"), [("prompt_tuning", torch.float32), ("prefix_tuning", torch.float16)])
def test_saved_prompt_loads_in_peft_and_gives_the_same_logits(
    method: Method,
    dtype: torch.dtype,
    dataset: Dataset,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = tune(method, dataset, backbone, tokenizer, num_steps=5).model
    save_prompt(model, tmp_path, dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == (method.upper(), 6)
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("tiny", True)

    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.dtype == torch.float32
    with torch.no_grad():
        weight.copy_(weight.to(dtype))  # what the file can hold
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), str(tmp_path)).eval()
    ids = torch.tensor([tokenizer("axu -> v")["input_ids"]])
    with torch.no_grad():
        wanted, got = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.equal(wanted, got)


def test_prompt_that_half_precision_cannot_hold_is_not_saved(
    dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tune("prompt_tuning", dataset, backbone, tokenizer, num_steps=1).model
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"not finite as torch\.float16"):
        save_prompt(model, tmp_path / "prompt", dtype=torch.float16)
    assert not (tmp_path / "prompt").exists()


def test_prefix_started_from_text_acts_like_that_text(
    dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = make_spec("prefix_tuning", k=9)
    model = attach_prompt(
        spec, dataset, copy.deepcopy(backbone), tokenizer, base_model_name="tiny", rng=random.Random(3)
    ).eval()
    text = worked_examples(spec, random.Random(3).sample(dataset.train, 9))
    first, ids = tokenizer(text)["input_ids"][:9], tokenizer("exw ->")["input_ids"]
    with torch.no_grad():
        with_prefix = model(input_ids=torch.tensor([ids])).logits
        with_text = backbone(input_ids=torch.tensor([[*first, *ids]])).logits[:, 9:]
    torch.testing.assert_close(with_prefix, with_text, atol=1e-5, rtol=0)


def test_loss_is_that_of_the_completions_alone_whatever_the_padding(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10)), ((11, 12), (13,))]
    got = completion_loss(backbone, batch, pad_token_id=0)
    total, num_tokens = 0.0, 0
    for prompt, completion in batch:
        ids = torch.tensor([[*prompt, *completion]])
        labels = torch.tensor([[-100] * len(prompt) + list(completion)])
        total += backbone(input_ids=ids, labels=labels).loss.item() * len(completion)
        num_tokens += len(completion)
    assert got.item() == pytest.approx(total / num_tokens, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_loss_with_a_prompt_is_that_of_items_one_at_a_time(
    method: Method, dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = make_spec(method)
    model = attach_prompt(spec, dataset, backbone, tokenizer, base_model_name="tiny", rng=random.Random(0)).eval()
    batch = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10)), ((11, 12), (13,))]
    got = completion_loss(model, batch, pad_token_id=0)
    logprobs = []
    for prompt, completion in batch:
        for num_known, token_id in enumerate(completion):
            ids = torch.tensor([[*prompt, *completion[:num_known]]])
            logprobs.append(model(input_ids=ids).logits[0, -1].log_softmax(-1)[token_id].item())
    assert got.item() == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-5)


def test_prefix_cannot_start_from_the_vocabulary(
    dataset: Dataset, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="init 'vocab' is for prompt_tuning"):
        train_prompt(
            make_spec("prefix_tuning", init="vocab"),
            dataset,
            backbone,
            tokenizer,
            config=TrainConfig(),
            base_model_name="tiny",
        )
