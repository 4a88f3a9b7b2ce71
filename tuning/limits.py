"""What a task must be before its first step: checked when it is given, so that a run of hours does not end in it."""

import re
from typing import Any

from transformers import PreTrainedModel

from tuning.methods import PromptBuilder
from tuning.records import TrainTask, TrainTaskError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_task(task: TrainTask, builder: PromptBuilder, model: PreTrainedModel) -> None:
    """Raises TrainTaskError, or UnsupportedBackboneError for a method that the backbone does not take."""
    if not _NAME.fullmatch(task.name):
        raise TrainTaskError(f"must match {_NAME.pattern}, for it names a folder", task=task.name[:128], field="name")
    if not task.train:
        raise TrainTaskError("there are no examples", task=task.name, field="train")
    vocab_size = builder.vocab_size
    longest = 0
    for field, examples in (("train", task.train), ("validation", task.validation)):
        for place, example in enumerate(examples):
            where = f"example {place + 1}"
            if not example.prompt_ids or not example.completion_ids:
                empty = "prompt" if not example.prompt_ids else "completion"
                raise TrainTaskError(f"{where} has an empty {empty}", task=task.name, field=field)
            ids = (*example.prompt_ids, *example.completion_ids)
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise TrainTaskError(
                    f"{where} has a token id outside of the vocabulary of {vocab_size}", task=task.name, field=field
                )
            longest = max(longest, len(ids))
    for label in task.label_ids:
        if any(not 0 <= token_id < vocab_size for token_id in label):
            raise TrainTaskError("a token id is outside of the vocabulary", task=task.name, field="label_ids")
    _check_length(task, builder, model, longest)
    builder.check(task)


def _check_length(task: TrainTask, builder: PromptBuilder, model: PreTrainedModel, longest: int) -> None:
    """Virtual tokens and the longest example must fit; a cartridge's teacher has the whole text in front."""
    limit = context_length(model)
    front = max(task.config.num_virtual_tokens, builder.num_text_tokens(task))
    if limit is not None and front + longest > limit:
        what = "virtual tokens" if front == task.config.num_virtual_tokens else "tokens of the text"
        raise TrainTaskError(
            f"{front} {what} and the longest example's {longest} tokens are more than the {limit} positions that the "
            "backbone has",
            task=task.name,
            field="num_virtual_tokens" if front == task.config.num_virtual_tokens else "init_text",
        )


def context_length(model: PreTrainedModel) -> int | None:
    """How many positions a row may take, None where the configuration does not say.

    transformers switches "dynamic" and "longrope" frequencies by the largest position of the whole packed batch: there
    it is as many as are computed alike whatever shares the pass.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            limits.append(original or getattr(config, "original_max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)
