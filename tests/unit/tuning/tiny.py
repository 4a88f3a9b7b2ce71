"""Small things to train on: random backbones of several families, and examples that can be learnt."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.factories import VOCAB_SIZE, save_tiny_backbone
from tuning.config import Method, RunConfig, TrainConfig
from tuning.examples import EncodedExample
from tuning.records import TrainTask

EOS_ID = 2
FIRST_ID = 5

FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "gpt_oss")
"""Grouped queries, learned positions and joined projections, biases, soft caps with windows, sinks with windows."""


def load_tiny(family: str, folder: Path) -> PreTrainedModel:
    """A random frozen fp32 model of the family, with the attention that transformers chooses."""
    saved = save_tiny_backbone(family, folder / family)
    model: Any = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def make_examples(count: int, *, seed: int = 0, longest: int = 12) -> tuple[EncodedExample, ...]:
    """Ragged prompts whose completion is their first token, and the end."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        prompt = tuple(rng.randrange(FIRST_ID, VOCAB_SIZE) for _ in range(rng.randrange(2, longest)))
        examples.append(EncodedExample(prompt, (prompt[0], *prompt[1 : rng.randrange(1, 3)], EOS_ID)))
    return tuple(examples)


def make_task(
    name: str,
    method: Method = "prompt_tuning",
    *,
    num_train: int = 24,
    num_validation: int = 0,
    label_ids: Sequence[Sequence[int]] = (),
    data_seed: int = 0,
    **config: Any,
) -> TrainTask:
    fields: dict[str, Any] = {"method": method, "num_virtual_tokens": 4, "num_steps": 6, "batch_size": 5} | config
    if method == "cartridge":
        fields.setdefault("init_text", "the long text that becomes a cartridge")
    return TrainTask(
        name=name,
        config=TrainConfig(**fields),
        train=make_examples(num_train, seed=data_seed),
        validation=make_examples(num_validation, seed=data_seed + 1000),
        label_ids=label_ids,
    )


def make_run(**fields: Any) -> RunConfig:
    return RunConfig(**fields)
