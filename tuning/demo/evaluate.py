"""How good a demo prompt is on held-out items, beside the same backbone without it.

Three things are measured in the same way: the prompt; the backbone given the same text and no prompt; and the backbone
with a written instruction, in each of the forms below. Answers are generated greedily (`tuning.evaluation`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuning.demo.data import Dataset, Example, TaskSpec, worked_examples
from tuning.evaluation import generate_greedily
from tuning.prefixes import Prefix

# Room beyond the longest right answer, for a backbone that writes more words than it was asked for.
SPARE_TOKENS = 4
NUM_WORKED_EXAMPLES = 4


@dataclass(frozen=True, slots=True)
class Score:
    """`exact_match` is the share of `answers` that are right, in [0, 1]; `answers` are aligned with the items."""

    exact_match: float
    answers: tuple[str, ...]


def evaluate_prompt(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    spec: TaskSpec,
    examples: Sequence[Example],
) -> Score:
    """Score the backbone on the bare texts, with a prompt's prefix or without."""
    texts = [tokenizer(spec.prompt_text(example))["input_ids"] for example in examples]
    return _score(backbone, tokenizer, prefix, texts, spec, examples)


def evaluate_instruction(
    backbone: PreTrainedModel,
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
        form: _score(backbone, tokenizer, None, [encode(item) for item in dataset.heldout], spec, dataset.heldout)
        for form, encode in forms.items()
    }


def normalise(answer: str) -> str:
    """What of an answer is compared: its first line without case, outer space, quotation marks and a final full stop.

    Lenient on purpose, and the same for all: otherwise an instruction would lose to a prompt on punctuation.
    """
    first_line = answer.strip().partition("\n")[0]
    return first_line.strip().strip("\"'").removesuffix(".").strip("\"'").strip().casefold()


def _score(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    texts: Sequence[Sequence[int]],
    spec: TaskSpec,
    examples: Sequence[Example],
) -> Score:
    answers = generate_greedily(
        backbone, tokenizer, prefix, texts, max_new_tokens=max_target_tokens(spec, examples, tokenizer) + SPARE_TOKENS
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
