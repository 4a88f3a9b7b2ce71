"""How good a prompt is on held-out examples: loss, exact match, and accuracy of labels by likelihood and by answers.

Runs the stock model over a prefix of keys and values (`tuning.prefixes`), so that all methods, and no prompt at all,
are measured by the same code, and without PEFT. An answer is right by the rule that a server's gate has. Refuses to
know how prompts are trained and where examples come from.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tuning.encoding import encode_label
from tuning.examples import EncodedExample, Example
from tuning.prefixes import Prefix

MAX_ROWS: Final = 32
MAX_BATCH_TOKENS: Final = 4096
# Of so many tokens the logits over the vocabulary are held at once.
MAX_BATCH_LOGITS: Final = 1024
# Room beyond the longest right answer, as a gate gives it.
NUM_SPARE_TOKENS: Final = 4
# With very many labels, fewer examples are scored by likelihood: a pass a label and batch is what it costs.
MAX_SCORES: Final = 50_000

Progress = Callable[[int], None]
"""Called with the number of examples done, after each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures over `num_examples`; shares in [0, 1].

    `loss` is in nats a completion token, the end-of-sequence token counted. `exact_match` is the share of greedy
    answers that are the completion. Of classification alone: `label_accuracy` is the share whose label is the likeliest
    (over the first `num_scored` examples), `label_match` the share whose greedy answer begins with its label, and with
    no longer one. `answers` are aligned with the examples.
    """

    num_examples: int
    loss: float
    exact_match: float
    label_accuracy: float | None
    label_match: float | None
    num_scored: int
    answers: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """All but the answers, fit for JSON, without what does not apply. A loss that is no number is None."""
        figures: dict[str, Any] = {
            "num_examples": self.num_examples,
            "loss": round(self.loss, 6) if math.isfinite(self.loss) else None,
            "exact_match": round(self.exact_match, 6),
        }
        if self.label_accuracy is not None and self.label_match is not None:
            figures |= {
                "label_accuracy": round(self.label_accuracy, 6),
                "label_match": round(self.label_match, 6),
                "num_scored": self.num_scored,
            }
        return figures


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
    *,
    labels: Sequence[str] = (),
    max_positions: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """All figures. `encoded` are the examples' token ids, in the same order; `prefix` None: the bare backbone.
    `max_positions` is what the backbone takes of a row, virtual tokens included.

    Raises ValueError without examples.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate on")
    loss = completion_loss(model, prefix, encoded)
    longest = max(len(example.completion_ids) for example in encoded)
    answers = generate_greedily(
        model,
        tokenizer,
        prefix,
        [example.prompt_ids for example in encoded],
        max_new_tokens=longest + NUM_SPARE_TOKENS,
        max_positions=max_positions,
        progress=progress,
    )
    num_right = sum(is_expected(answer, example.completion) for answer, example in zip(answers, examples, strict=True))
    label_accuracy, label_match, num_scored = None, None, 0
    labelled = [place for place, example in enumerate(examples) if example.label is not None]
    if labelled and len(labels) > 1:
        wanted = [str(examples[place].label) for place in labelled]
        matched = [find_label(answers[place], labels) for place in labelled]
        label_match = _share(matched, wanted)
        num_scored = min(len(labelled), max(1, MAX_SCORES // len(labels)))
        label_ids = [encode_label(label, tokenizer) for label in labels]
        prompts = [encoded[place].prompt_ids for place in labelled[:num_scored]]
        scores = score_labels(model, prefix, prompts, label_ids, max_positions=max_positions)
        likeliest = [labels[place] for place in scores.argmax(dim=1).tolist()]
        label_accuracy = _share(likeliest, wanted[:num_scored])
    return Evaluation(
        num_examples=len(examples),
        loss=loss,
        exact_match=num_right / len(examples),
        label_accuracy=label_accuracy,
        label_match=label_match,
        num_scored=num_scored,
        answers=tuple(answers),
    )


def is_expected(answer: str, completion: str) -> bool:
    """Whether an answer is the completion, by the rule of a server's gate: both without surrounding space, and the
    answer only up to the end of its first line unless the completion has several.
    """
    expected, given = completion.strip(), answer.strip()
    if "\n" not in expected:
        given = given.partition("\n")[0].rstrip()
    return given == expected


def find_label(answer: str, labels: Sequence[str]) -> str | None:
    """The longest label that an answer begins with."""
    found = [label for label in labels if answer.strip().startswith(label)]
    return max(found, key=len, default=None)


@torch.inference_mode()
def completion_loss(model: PreTrainedModel, prefix: Prefix | None, encoded: Sequence[EncodedExample]) -> float:
    """Mean negative log-likelihood of all completions' tokens, in nats a token."""
    total, num_tokens = 0.0, 0
    lengths = [example.num_tokens for example in encoded]
    num_logits = [len(example.completion_ids) + 1 for example in encoded]
    for places in _batches(model, lengths, num_logits):
        batch = [encoded[place] for place in places]
        rows = _Rows(model, prefix, [example.prompt_ids + example.completion_ids for example in batch])
        # Rows end together, so that the completions are among the last columns.
        num_kept = max(len(example.completion_ids) for example in batch) + 1
        logits = rows.forward(num_kept)
        for row, example in enumerate(batch):
            length = len(example.completion_ids)
            targets = torch.tensor(example.completion_ids, device=logits.device)
            loss = torch.nn.functional.cross_entropy(
                logits[row, num_kept - 1 - length : num_kept - 1].float(), targets, reduction="sum"
            )
            total += loss.item()
            num_tokens += length
    return total / num_tokens


@torch.inference_mode()
def score_labels(
    model: PreTrainedModel,
    prefix: Prefix | None,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    *,
    max_positions: int | None = None,
) -> torch.Tensor:
    """Log-likelihood of each label behind each prompt, `[num_prompts, num_labels]`, fp32 on the CPU."""
    scores = torch.empty((len(prompts), len(label_ids)))
    for places in _batches(model, [len(prompt) for prompt in prompts], [1] * len(prompts)):
        rows = _Rows(model, prefix, [prompts[place] for place in places], max_positions)
        first = rows.forward(1)[:, -1].float().log_softmax(-1)
        for label, ids in enumerate(label_ids):
            score = first[:, ids[0]].clone()
            if len(ids) > 1:
                # The prompt is read once for all labels: what a label adds to the cache is taken away again.
                after = rows.append(torch.tensor([ids[:-1]], device=first.device).expand(len(places), -1), len(ids) - 1)
                targets = torch.tensor(ids[1:], device=first.device).expand(len(places), -1).unsqueeze(-1)
                score += after.float().log_softmax(-1).gather(-1, targets).sum(dim=(1, 2))
                rows.take_back(len(ids) - 1)
            scores[places, label] = score.cpu()
    return scores


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_positions: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The decoded greedy continuation of each prompt, up to the end-of-sequence token, or to `max_positions`."""
    ends = _end_ids(model, tokenizer)
    answers = [""] * len(prompts)
    num_done = 0
    for places in _batches(model, [len(prompt) + max_new_tokens for prompt in prompts], [1] * len(prompts)):
        rows = _Rows(model, prefix, [prompts[place] for place in places], max_positions)
        chosen = rows.forward(1)[:, -1].argmax(-1)
        columns = [chosen]
        has_ended = torch.isin(chosen, ends)
        while len(columns) < max_new_tokens and not bool(has_ended.all()):
            chosen = rows.append(chosen.unsqueeze(1), 1)[:, -1].argmax(-1)
            columns.append(chosen)
            has_ended |= torch.isin(chosen, ends)
        end_ids = set(ends.tolist())
        for place, ids in zip(places, torch.stack(columns, dim=1).tolist(), strict=True):
            if max_positions is not None:
                del ids[max(0, max_positions - rows.num_virtual - len(prompts[place])) :]
            length = next((index for index, token in enumerate(ids) if token in end_ids), len(ids))
            answers[place] = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        num_done += len(places)
        if progress is not None:
            progress(num_done)
    return answers


class _Rows:
    """Texts of one batch behind the prefix, padded on the left, and what the model keeps of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Prefix | None,
        texts: Sequence[Sequence[int]],
        max_positions: int | None = None,
    ) -> None:
        self._model: Any = model
        # Rows of a batch go on until all have ended: one that has no position left stays at its last.
        self._last_position = None if max_positions is None else max_positions - 1
        length = max(map(len, texts))
        num_rows, num_virtual = len(texts), 0 if prefix is None else prefix.num_virtual_tokens
        self.num_virtual = num_virtual
        self._cache = DynamicCache() if prefix is None else prefix.make_cache(num_rows)
        # Padding is masked, so that any token does.
        self._ids = torch.zeros((num_rows, length), dtype=torch.long)
        self._mask = torch.ones((num_rows, num_virtual + length), dtype=torch.long)
        for row, text in enumerate(texts):
            self._ids[row, length - len(text) :] = torch.tensor(text)
            self._mask[row, num_virtual : num_virtual + length - len(text)] = 0
        self._ids, self._mask = self._ids.to(model.device), self._mask.to(model.device)

    def forward(self, num_logits: int) -> torch.Tensor:
        """Logits of the last `num_logits` columns, `[rows, num_logits, vocabulary]`."""
        return self._run(self._ids, num_logits)

    def append(self, ids: torch.Tensor, num_logits: int) -> torch.Tensor:
        """As `forward`, for tokens `[rows, n]` that follow; padding is not needed there."""
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        return self._run(ids, num_logits)

    def take_back(self, num_tokens: int) -> None:
        """Forget the last tokens."""
        self._cache.crop(-num_tokens)
        self._mask = self._mask[:, :-num_tokens]

    def _run(self, ids: torch.Tensor, num_logits: int) -> torch.Tensor:
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0, max=self._last_position)[:, -ids.shape[1] :]
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_logits,
        ).logits
        return logits


def _batches(model: PreTrainedModel, lengths: Sequence[int], num_logits: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts that are run together: near to each other in length, and few enough to fit.

    A sliding window is counted in columns, so that padding would push the prefix out of it: texts of such models are
    put together only with those of their own length.
    """
    allows_padding = not _has_window(model)
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch:
            longest = lengths[batch[0]]
            most_logits = max(num_logits[place], *(num_logits[index] for index in batch))
            size = len(batch) + 1
            if (
                size > MAX_ROWS
                or size * longest > MAX_BATCH_TOKENS
                or size * most_logits > MAX_BATCH_LOGITS
                or not (allows_padding or lengths[place] == longest)
            ):
                yield batch
                batch = []
        batch.append(place)
    if batch:
        yield batch


def _has_window(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The tokens that end an answer: the tokenizer's, and what else the model's generation configuration names."""
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return torch.tensor(sorted(found), dtype=torch.long, device=model.device)


def _share(found: Sequence[str | None], wanted: Sequence[str]) -> float:
    return math.fsum(one == other for one, other in zip(found, wanted, strict=True)) / len(wanted)
