"""From a step's logits to what each row is given: log-probabilities of its own prompt, its next token, its text, its
end.

There are two halves, so that the host may do other work while the device computes. `launch` hands the device what is to
be made of the logits and advances the rows by what is known without looking: how many tokens they have, not which.
`collect`, one step later where steps overlap, looks.

Knows rows and logits; knows nothing of pages, queues and clients: the engine emits what comes out and retires what
ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.logprobs import DeviceLogprobs
from server.engine.plan import IntArray, StepPlan
from server.engine.request import FINISH_LENGTH, FINISH_STOP, RowOutput, TokenLogprob
from server.engine.row import Row, RowState
from server.engine.sampler import DeviceSample, Sampled, SamplerRow, reads_own_tokens, sample_async
from server.engine.scheduler import ScheduledRow
from server.engine.transfers import Download, upload
from server.errors import NumericalError

_NOT_FINITE = "the logits of this row are not finite; its prompt is likely broken"


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedRow:
    """A row as it took part in a step: what the row itself says has changed by the time the step is collected.

    `num_left` is how many of the tokens that it had it computes in later steps. `place` is that of its token in the
    step's sample. `scores` are the log-probabilities of its own tokens that the step owes, and whether their logits are
    finite.
    """

    row: Row
    num_tokens: int
    num_left: int
    num_preemptions: int
    is_unanswered: bool
    place: int | None
    scores: "tuple[DeviceLogprobs, Download] | None"

    @property
    def is_current(self) -> bool:
        """Whether the row goes on from this step: it has neither ended nor been preempted since."""
        return self.row.state is RowState.RUNNING and self.row.num_preemptions == self.num_preemptions


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """A step that the device has been given, its rows in packed order.

    `sampled_for[i]` is the serial of the row for which token i of the sample is chosen, read from the checked plan.
    """

    rows: list[LaunchedRow]
    sample: DeviceSample | None
    sampled_for: IntArray


class StepResults:
    """Takes a step's results into the rows, in two halves. `eos_token_ids` are the backbone's."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def launch(
        self,
        plan: StepPlan,
        packed: Sequence[ScheduledRow],
        logits: torch.Tensor,
        *,
        before: LaunchedStep | None = None,
        may_wait: bool = True,
    ) -> LaunchedStep:
        """Have the step's tokens and log-probabilities made, and count the step's tokens as computed.

        `packed` are the rows in the plan's order, `logits [L, vocab_size]` those of `plan.logits_tokens`. `before` is
        the step whose results have not been collected yet. Without `may_wait` nothing is asked of the device, but the
        tokens of the step before when a row has penalties: they depend on which tokens it has.
        """
        # The logits come in packed order, each entry's side by side.
        firsts = np.searchsorted(plan.logits_entries, np.arange(len(packed)), side="left")
        ends = np.searchsorted(plan.logits_entries, np.arange(len(packed)), side="right")
        launched: list[LaunchedRow] = []
        sampled: list[int] = []
        sampler_rows: list[SamplerRow] = []
        for index, item in enumerate(packed):
            row, num_left = item.row, item.row.num_uncomputed - item.num_tokens
            scores = None
            if row.wants_prompt_logprobs and row.num_computed < row.num_prompt_tokens:
                scores = _scores(row, item.num_tokens, logits[firsts[index] : ends[index]])
            place = None
            if item.yields_token and row.request.sampling.max_tokens > 0:
                place = len(sampled)
                sampled.append(int(ends[index]) - 1)
                sampler_rows.append(self._sampler_row(row, before))
            is_unanswered = item.yields_token and place is None
            launched.append(
                LaunchedRow(row, item.num_tokens, num_left, row.num_preemptions, is_unanswered, place, scores)
            )
            _count_as_computed(launched[-1])
        places = np.array(sampled, dtype=np.int64)
        serials = np.array([item.row.serial for item in packed], dtype=np.int64)
        sample = None
        if sampled:
            if len(sampled) < len(logits):
                logits = logits[upload([places], logits.device)[0]]
            sample = sample_async(logits, sampler_rows, may_wait=may_wait)
        return LaunchedStep(launched, sample, serials[plan.logits_entries[places]])

    def collect(self, step: LaunchedStep) -> Iterator[tuple[Row, RowOutput]]:
        """Give every row what the step made for it, and yield what is new. Waits for the device.

        Rows that have ended since get nothing. Nor do those that were preempted: they compute it again.
        """
        sampled = step.sample.to_host() if step.sample is not None else []
        for item in step.rows:
            if not item.is_current:
                continue
            row = item.row
            row.num_in_flight -= item.num_tokens
            if item.place is not None:
                row.num_pending -= 1
            if item.scores is not None and not _take_scores(row, *item.scores):
                yield row, RowOutput(row_id=row.row_id, error=NumericalError(_NOT_FINITE))
            elif item.is_unanswered:
                yield row, self._end_without_tokens(row)
            elif item.place is not None:
                yield row, self._take_token(row, sampled[item.place])

    def _sampler_row(self, row: Row, before: LaunchedStep | None) -> SamplerRow:
        sampling = row.request.sampling
        token_ids, num_pending = row.token_ids, row.num_pending
        if num_pending and reads_own_tokens(sampling):
            if before is None or before.sample is None:
                raise RuntimeError(f"row {row.row_id} awaits a token of no step")
            # The device has this step's pass to do meanwhile. A row without a token ends: what it is given is dropped.
            token_id = before.sample.to_host()[row.sample_place].token_id
            token_ids, num_pending = [*token_ids, token_id or 0], 0
        banned: frozenset[int] = frozenset()
        if row.num_generated + row.num_pending < sampling.min_tokens:
            banned = self._eos_token_ids | frozenset(sampling.stop_token_ids)
        return SamplerRow(
            params=sampling,
            token_ids=token_ids,
            num_prompt_tokens=row.num_prompt_tokens,
            seed=row.seed,
            banned=banned,
            wants_logprob=row.is_audited,
            num_pending=num_pending,
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


def _count_as_computed(item: LaunchedRow) -> None:
    row = item.row
    row.num_computed += item.num_tokens
    row.num_in_flight += item.num_tokens
    if item.place is not None:
        row.num_pending += 1
        row.sample_place = item.place


def _scores(row: Row, num_tokens: int, logits: torch.Tensor) -> tuple[DeviceLogprobs, Download]:
    """What the logits of a row's tokens from `num_computed` on say of the tokens after each, and if they are finite.

    `logits [num_tokens, vocab_size]`.
    """
    following = row.token_ids[row.num_computed + 1 : row.num_computed + num_tokens + 1]
    following = following[: row.num_prompt_tokens - row.num_computed - 1]
    logits = logits[: len(following)]
    (ids,) = upload([np.array(following, dtype=np.int64)], logits.device)
    alternatives = [row.request.sampling.prompt_logprobs] * len(following)
    # NaN and +inf pass through a maximum; -inf may be a model's own mask and is harmless.
    is_finite = logits.amax(dim=-1).isfinite().all()
    return DeviceLogprobs(logits, ids, alternatives), Download([is_finite])


def _take_scores(row: Row, logprobs: DeviceLogprobs, finite: Download) -> bool:
    """Returns False when they are not finite."""
    if not row.pending_prompt_logprobs:
        row.pending_prompt_logprobs.append(None)
    (is_finite,) = finite.wait()
    if not bool(is_finite):
        return False
    row.pending_prompt_logprobs.extend(logprobs.to_host())
    return True
