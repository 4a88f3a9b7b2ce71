"""How good a prompt is on held-out items, beside the same backbone without it.

Three things are measured in the same way: the prompt; the backbone given the same text and no prompt; and the backbone
with a written instruction, in each of the forms below. Answers are generated greedily. Items are batched only with
items of the same length, so that nothing is padded: PEFT 0.21 ignores position ids, and answers left-padded batches
under prompt tuning wrongly.
"""

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuning.data import Dataset, Example, TaskSpec, worked_examples

MAX_BATCH = 16
# Room beyond the longest right answer, for a backbone that writes more words than it was asked for.
SPARE_TOKENS = 4
NUM_WORKED_EXAMPLES = 4


@dataclass(frozen=True, slots=True)
class Score:
    """`exact_match` is the share of `answers` that are right, in [0, 1]; `answers` are aligned with the items."""

    exact_match: float
    answers: tuple[str, ...]


def evaluate_prompt(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, examples: Sequence[Example]
) -> Score:
    """Score `model` on the bare texts. With a PeftModel that is the prompt; with a backbone, the backbone alone."""
    texts = [tokenizer(spec.prompt_text(example))["input_ids"] for example in examples]
    return _score(model, tokenizer, texts, spec, examples)


def evaluate_instruction(
    backbone: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    dataset: Dataset,
    *,
    seed: int,
) -> dict[str, Score]:
    """Score the backbone with the task's written instruction, by form.

    "chat": the instruction and the input as one user turn of the chat template. "chat-examples": the same after four
    training items as earlier turns. "plain-examples": the instruction and four training items as plain lines. The two
    chat forms are left out where the tokenizer has no template.
    """
    rng = random.Random(f"{seed}:{spec.name}:examples")  # noqa: S311 - a reproducible choice, not a secret
    shown = rng.sample(dataset.train, min(NUM_WORKED_EXAMPLES, len(dataset.train)))
    lines = f"{spec.instruction}\n\n{worked_examples(spec, shown)}"
    earlier: list[dict[str, str]] = []
    for example in shown:
        earlier += [_user_turn(spec, example), {"role": "assistant", "content": example.target}]
    forms: dict[str, Callable[[Example], list[int]]] = {
        "plain-examples": lambda item: tokenizer(lines + spec.prompt_text(item))["input_ids"],
    }
    if tokenizer.chat_template is not None:
        forms["chat"] = lambda item: _chat_ids(tokenizer, [_user_turn(spec, item)])
        forms["chat-examples"] = lambda item: _chat_ids(tokenizer, [*earlier, _user_turn(spec, item)])
    return {
        form: _score(backbone, tokenizer, [encode(item) for item in dataset.heldout], spec, dataset.heldout)
        for form, encode in forms.items()
    }


def normalise(answer: str) -> str:
    """What of an answer is compared: its first line without case, outer space, quotation marks and a final full stop.

    Lenient on purpose, and the same for all: otherwise an instruction would lose to a prompt on punctuation.
    """
    first_line = answer.strip().partition("\n")[0]
    return first_line.strip().strip("\"'").removesuffix(".").strip("\"'").strip().casefold()


@torch.no_grad()
def generate_greedily(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """The decoded continuation of each text (token ids), up to the end-of-sequence token or a line break."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        by_length[len(text)].append(index)
    answers = [""] * len(texts)
    device = next(model.parameters()).device
    generator: Any = model
    for length, same_length in by_length.items():
        for start in range(0, len(same_length), MAX_BATCH):
            indices = same_length[start : start + MAX_BATCH]
            input_ids = torch.tensor([list(texts[i]) for i in indices], device=device)
            with warnings.catch_warnings():
                # PEFT drops the position ids that `generate` makes; without padding they say nothing new.
                warnings.filterwarnings("ignore", message="Position ids are not supported")
                output_ids = generator.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                    # No answer has two lines, and `normalise` reads one.
                    stop_strings=["\n"],
                    tokenizer=tokenizer,
                )
            decoded = tokenizer.batch_decode(output_ids[:, length:], skip_special_tokens=True)
            for index, answer in zip(indices, decoded, strict=True):
                answers[index] = answer
    return answers


def _score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    spec: TaskSpec,
    examples: Sequence[Example],
) -> Score:
    answers = generate_greedily(
        model, tokenizer, texts, max_new_tokens=max_target_tokens(spec, examples, tokenizer) + SPARE_TOKENS
    )
    num_right = sum(normalise(a) == normalise(e.target) for a, e in zip(answers, examples, strict=True))
    return Score(num_right / len(examples), tuple(answer.strip() for answer in answers))


def max_target_tokens(spec: TaskSpec, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest right answer, without the end-of-sequence token."""
    return max(len(tokenizer(spec.completion_text(e), add_special_tokens=False)["input_ids"]) for e in examples)


def _user_turn(spec: TaskSpec, example: Example) -> dict[str, str]:
    return {"role": "user", "content": f"{spec.instruction}\n\n{example.input}"}


def _chat_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # The template writes every special token itself.
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids
