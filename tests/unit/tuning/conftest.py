"""A tiny random Llama with a tokenizer of bytes, and a task small enough to be learnt by it."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tuning.data import Dataset, Example, Method, TaskSpec, build_dataset

EOS = "<|end|>"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, EOS])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


@pytest.fixture
def backbone(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def vowel_examples() -> Iterator[Example]:
    for letters in itertools.product("abcde", "xyz", "uvw"):
        yield Example("".join(letters), "v" if letters[0] in "ae" else "c")


def make_spec(method: Method = "prompt_tuning", **changes: object) -> TaskSpec:
    fields: dict[str, object] = {
        "name": "vowel",
        "description": "Whether a word starts with a vowel",
        "template": "{input} ->",
        "instruction": "v or c?",
        "method": method,
        "k": 6,
        "init": "vocab" if method == "prompt_tuning" else "text",
        "examples": vowel_examples,
        "labels": ("v", "c"),
        "num_steps": 30,
    }
    return TaskSpec(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def dataset() -> Dataset:
    return build_dataset(make_spec(), seed=0)
