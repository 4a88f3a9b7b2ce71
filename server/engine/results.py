"""From a step's logits to what each row is given: log-probabilities of its own prompt, its next token, its text, its
end.

Knows rows and logits; knows nothing of pages, queues and clients: the engine emits what comes out and retires what
ended.
"""

from collections.abc import Iterator

import torch

from server.engine.plan import StepPlan
from server.engine.request import FINISH_LENGTH, FINISH_STOP, RowOutput, TokenLogprob
from server.engine.row import Row
from server.engine.sampler import Sampled, SamplerRow, sample, token_logprobs
from server.engine.scheduler import ScheduledRow
from server.errors import NumericalError

_NOT_FINITE = "the logits of this row are not finite; its prompt is likely broken"


class StepResults:
    """Takes a step's results into the rows. `eos_token_ids` are the backbone's."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def collect(
        self, plan: StepPlan, packed: list[ScheduledRow], logits: torch.Tensor
    ) -> Iterator[tuple[Row, RowOutput]]:
        """Advance every row by what the step computed and yield what is new.

        `packed` are the rows in the plan's order, `logits [L, vocab_size]` those of `plan.logits_tokens`.
        """
        indices_of: list[list[int]] = [[] for _ in packed]
        for position, entry in enumerate(plan.logits_entries.tolist()):
            indices_of[entry].append(position)
        yielding: list[tuple[Row, int]] = []
        for item, indices in zip(packed, indices_of, strict=True):
            row, yields_token = item.row, item.yields_token
            is_finite = True
            if row.wants_prompt_logprobs and row.num_computed < row.num_prompt_tokens:
                is_finite = _add_prompt_logprobs(row, item.num_tokens, logits[indices])
            row.num_computed += item.num_tokens
            if not is_finite:
                yield row, RowOutput(row_id=row.row_id, error=NumericalError(_NOT_FINITE))
            elif yields_token and row.request.sampling.max_tokens == 0:
                yield row, self._end_without_tokens(row)
            elif yields_token:
                yielding.append((row, indices[-1]))
        if yielding:
            index = torch.tensor([last for _, last in yielding], device=logits.device)
            wanted = logits if len(index) == len(logits) else logits[index]
            sampled = sample(wanted, [self._sampler_row(row) for row, _ in yielding])
            for (row, _), result in zip(yielding, sampled, strict=True):
                yield row, self._take_token(row, result)

    def _sampler_row(self, row: Row) -> SamplerRow:
        sampling = row.request.sampling
        banned: frozenset[int] = frozenset()
        if row.num_generated < sampling.min_tokens:
            banned = self._eos_token_ids | frozenset(sampling.stop_token_ids)
        return SamplerRow(
            params=sampling,
            token_ids=row.token_ids,
            num_prompt_tokens=row.num_prompt_tokens,
            seed=row.seed,
            banned=banned,
            wants_logprob=row.is_audited,
        )

    def _take_token(self, row: Row, result: Sampled) -> RowOutput:
        token_id = result.token_id
        if token_id is None:
            return RowOutput(row_id=row.row_id, error=NumericalError(_NOT_FINITE))
        sampling = row.request.sampling
        row.token_ids.append(token_id)
        if row.is_audited and result.logprob is not None:
            row.audit_logprobs.append(result.logprob.logprob)
        finish_reason: str | None = None
        stop_reason: int | str | None = None
        text = ""
        if token_id in sampling.stop_token_ids:
            finish_reason, stop_reason = FINISH_STOP, token_id
        elif token_id in self._eos_token_ids and not sampling.ignore_eos:
            finish_reason = FINISH_STOP
        else:
            text = row.text.add(token_id, check_stop=row.num_generated > sampling.min_tokens)
            if row.text.stopped_by is not None:
                finish_reason, stop_reason = FINISH_STOP, row.text.stopped_by
            elif row.num_generated >= sampling.max_tokens:
                finish_reason = FINISH_LENGTH
        if finish_reason is not None and row.text.stopped_by is None:
            text += row.text.finish()
        shown = result.logprob if sampling.logprobs is not None else None
        return RowOutput(
            row_id=row.row_id,
            text=text,
            token_ids=(token_id,),
            logprobs=(shown,) if shown is not None else (),
            prompt_logprobs=take_prompt_logprobs(row),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            queue_s=row.queue_s if row.num_generated == 1 else None,
            num_cached=row.num_cached if row.num_generated == 1 else 0,
        )

    def _end_without_tokens(self, row: Row) -> RowOutput:
        return RowOutput(
            row_id=row.row_id,
            prompt_logprobs=take_prompt_logprobs(row),
            finish_reason=FINISH_LENGTH,
            num_cached=row.num_cached,
        )


def take_prompt_logprobs(row: Row) -> tuple[TokenLogprob | None, ...] | None:
    """The row's prompt log-probabilities, once; None when they were not asked for or have been taken."""
    if not row.pending_prompt_logprobs:
        return None
    entries = tuple(row.pending_prompt_logprobs)
    row.pending_prompt_logprobs.clear()
    return entries


def _add_prompt_logprobs(row: Row, num_tokens: int, logits: torch.Tensor) -> bool:
    """`logits [num_tokens, vocab_size]` of the row's tokens from `num_computed` on: each predicts the token after it.

    Returns False when they are not finite.
    """
    if not row.pending_prompt_logprobs:
        row.pending_prompt_logprobs.append(None)
    following = row.token_ids[row.num_computed + 1 : row.num_computed + num_tokens + 1]
    following = following[: row.num_prompt_tokens - row.num_computed - 1]
    # NaN and +inf pass through a maximum; -inf may be a model's own mask and is harmless.
    if not bool(logits[: len(following)].amax(dim=-1).isfinite().all()):
        return False
    alternatives = [row.request.sampling.prompt_logprobs] * len(following)
    row.pending_prompt_logprobs.extend(token_logprobs(logits[: len(following)], following, alternatives))
    return True
