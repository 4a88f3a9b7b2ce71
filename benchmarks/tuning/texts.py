"""What people write to a frozen model in place of a tuned prompt: nothing, an instruction, worked examples.

Owns the wording: the task's own instruction in five forms. Each form turns test items into examples with another prompt
text and the same answer. Refuses to know how answers are made and scored.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.tuning.cells import NO_PROMPT
from benchmarks.tuning.tasks import input_of
from tuning.demo.data import TaskSpec
from tuning.examples import ChatTemplate, Example, TaskData


def in_form(
    form: str, spec: TaskSpec, data: TaskData, *, tokenizer: ChatTemplate, num_shots: int, seed: int | None
) -> list[Example]:
    """The test items as they are sent in a form of `cells.TEXTS`. `seed` decides which training items are shown."""
    return [_rewriter(form, spec, data, tokenizer, num_shots, seed)(item) for item in data.test]


def _rewriter(
    form: str, spec: TaskSpec, data: TaskData, tokenizer: ChatTemplate, num_shots: int, seed: int | None
) -> Callable[[Example], Example]:
    if form == NO_PROMPT:
        return lambda item: item
    kind, _, style = form.rpartition("-")
    shown = _shown(spec, data.train, num_shots, seed) if kind == "few-shot" else []
    if style == "plain":
        lines = "".join(f"{item.prompt}{item.completion}\n" for item in shown)
        return lambda item: replace(item, prompt=f"{spec.instruction}\n\n{lines}{item.prompt}")
    turns: list[dict[str, str]] = []
    for item in shown:
        turns += [_user_turn(spec, item), {"role": "assistant", "content": item.completion.strip()}]

    def as_chat(item: Example) -> Example:
        text = tokenizer.apply_chat_template(
            [*turns, _user_turn(spec, item)], add_generation_prompt=True, tokenize=False
        )
        # After the template's line break an answer begins without the space that it has inside a line.
        return replace(item, prompt=text, completion=item.completion.strip(), is_rendered=True)

    return as_chat


def _shown(spec: TaskSpec, train: Sequence[Example], num_shots: int, seed: int | None) -> list[Example]:
    rng = random.Random(f"{seed}:{spec.name}:shots")
    return rng.sample(list(train), min(num_shots, len(train)))


def _user_turn(spec: TaskSpec, item: Example) -> dict[str, str]:
    return {"role": "user", "content": f"{spec.instruction}\n\n{input_of(spec, item.prompt)}"}
