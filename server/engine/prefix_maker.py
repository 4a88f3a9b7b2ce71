"""Makes the numbers of prefixes: checked, computed into pages of the pool, and cut into shared pages and a tail.

A prompt of input embeddings is compiled: one forward pass of its k vectors, whose keys and values are then the prefix.
Its bits are a function of prompt and backbone and of nothing that happened to share the batch; an evicted prefix that
is compiled again is the same prefix. So prompts share a pass only where the backbone's bits were seen not to depend on
that (`Backbone.prefixes_share_passes`), and are compiled alone elsewhere. Trained keys and values are cast and used as
they are. Refuses to know which prompts are wanted and what has to go for them (`server.engine.residency`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.isolation import Claim, check_plan
from server.engine.kv import KeysValues, KvPool, StackedColumns, num_pages_for
from server.engine.pages import PAGE_SIZE, SHARED, PageNumbers, content_of_prefix
from server.engine.plan import PlanEntry, build_plan
from server.engine.request import PromptRef
from server.engine.row_pages import RowPages
from server.errors import IsolationError, NumericalError, PromptMismatchError, PromptmuxError, UnavailableError
from server.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MadePrefix:
    """Full pages, shared under the prompt's content ids, and the columns that do not fill a page."""

    ref: PromptRef
    pages: PageNumbers
    tail: StackedColumns | None


@dataclass(frozen=True, slots=True)
class _Job:
    ref: PromptRef
    prompt: SoftPrompt
    serial: int
    pages: PageNumbers


class PrefixMaker:
    """One an engine. The engine thread alone calls it."""

    def __init__(
        self,
        backbone: Backbone,
        pool: KvPool,
        metrics: Metrics,
        *,
        max_virtual_tokens: int,
        next_serial: Callable[[], int],
    ) -> None:
        self._backbone = backbone
        self._pool = pool
        self._metrics = metrics
        self._max_virtual_tokens = min(max_virtual_tokens, backbone.max_model_len)
        self._next_serial = next_serial

    def can_share_pass(self, prompt: SoftPrompt) -> bool:
        """Whether the prompt may be made together with others."""
        return prompt.kind == "embeddings" and self._backbone.prefixes_share_passes

    def require_fit(self, ref: PromptRef, prompt: SoftPrompt) -> None:
        """A prompt that was stored for another backbone must end its own rows, not the step loop.

        Raises PromptMismatchError.
        """
        if prompt.kind != ref.kind or prompt.num_virtual_tokens != ref.num_virtual_tokens:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} was to have {ref.num_virtual_tokens} {ref.kind}, "
                f"its file has {prompt.num_virtual_tokens} {prompt.kind}"
            )
        k = prompt.num_virtual_tokens
        if k > self._max_virtual_tokens:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} has {k} virtual tokens; {self._max_virtual_tokens} are allowed"
            )
        shape = self._backbone.shape(k)
        if prompt.kind == "prefix":
            expected: tuple[int | None, ...] = (shape.num_layers, 2, shape.kv_heads, k, shape.head_dim)
        else:
            expected = (k, shape.hidden_size)
        if prompt.values.shape != expected:
            raise PromptMismatchError(
                f"{ref.task}@{ref.version} has the shape {prompt.values.shape}, this backbone needs {expected}"
            )

    def make_all(self, prompts: Sequence[tuple[PromptRef, SoftPrompt]]) -> list[MadePrefix | PromptmuxError]:
        """One pass for all of them; what fails is made again alone, so that it fails for itself only.

        `prompts` are of the kinds that `can_share_pass`, or one alone. The answers are in their order.
        """
        try:
            return self._make(prompts)
        except Exception as fault:
            if len(prompts) > 1:
                logger.warning("%d prompts are compiled one by one: %s", len(prompts), fault)
                return [answer for one in prompts for answer in self.make_all([one])]
            if isinstance(fault, PromptmuxError):
                return [fault]
            ref = prompts[0][0]
            logger.exception("%s@%s could not be compiled", ref.task, ref.version)
            return [UnavailableError(f"the prompt of {ref.task}@{ref.version} could not be compiled: {fault}")]

    def _make(self, prompts: Sequence[tuple[PromptRef, SoftPrompt]]) -> list[MadePrefix | PromptmuxError]:
        jobs: list[_Job] = []
        answers: list[MadePrefix | PromptmuxError] = []
        try:
            for ref, prompt in prompts:
                serial = self._next_serial()
                pages = self._pool.allocate_prefix(serial, num_pages_for(prompt.num_virtual_tokens))
                if pages is None:
                    raise RuntimeError("the prefixes' part of the pool is full although there was room")
                jobs.append(_Job(ref, prompt, serial, pages))
            if prompts[0][1].kind == "prefix":
                self._pool.write(jobs[0].pages, self._pool.stack(self._cast(jobs[0].prompt)))
            else:
                self._run(jobs)
            for job in jobs:
                answers.append(self._cut(job))
        except BaseException:
            for answer in answers:
                if isinstance(answer, MadePrefix):
                    self._pool.release_prefix(answer.pages, SHARED)
            for job in jobs[len(answers) :]:
                self._pool.release_prefix(job.pages, job.serial)
            raise
        return answers

    def _run(self, jobs: Sequence[_Job]) -> None:
        """One forward pass of the prompts' vectors, each prompt a row of its own, into pages that the jobs own."""
        entries: list[PlanEntry] = []
        claims: list[Claim] = []
        for job in jobs:
            k = job.prompt.num_virtual_tokens
            vectors = torch.from_numpy(np.ascontiguousarray(job.prompt.values)).to(self._backbone.device)
            placeholders = [0] * k
            own = RowPages(k)
            own.append(job.pages, self._pool.ledger)
            entries.append(PlanEntry(own.numbers, 0, placeholders, logits_from=k, vectors=vectors))
            claim = Claim(
                serial=job.serial, start_column=0, token_ids=placeholders, num_logits=0, pages=own.numbers,
                generations=own.generations, contents=own.contents, vectors=vectors,
            )  # fmt: skip
            claims.append(claim)
        plan, order = build_plan(entries)
        for violation in check_plan(plan, [claims[index] for index in order], self._pool.ledger):
            self._metrics.isolation_violations_total.inc()
            raise IsolationError(f"compiling a prompt: {violation.reason}")
        self._backbone.forward(self._pool, plan)

    def _cut(self, job: _Job) -> MadePrefix | NumericalError:
        """Share the full pages and copy what lies behind them; the last page is given back."""
        k = job.prompt.num_virtual_tokens
        num_full = k // PAGE_SIZE
        columns = self._pool.read(job.pages, k)
        if not columns.is_finite():
            self._pool.release_prefix(job.pages, job.serial)
            return NumericalError(
                f"the prefix of {job.ref.task}@{job.ref.version} is not finite in {self._backbone.dtype_name}"
            )
        tail = columns.columns(num_full * PAGE_SIZE, k).clone() if k % PAGE_SIZE else None
        for index in range(num_full):
            self._pool.ledger.share(int(job.pages[index]), job.serial, content_of_prefix(job.ref.prefix_key, index))
        self._pool.release_prefix(job.pages[num_full:], job.serial)
        return MadePrefix(job.ref, job.pages[:num_full], tail)

    def _cast(self, prompt: SoftPrompt) -> KeysValues:
        stacked = torch.from_numpy(prompt.values).to(device=self._backbone.device, dtype=self._backbone.dtype)
        return KeysValues(tuple(layer[0] for layer in stacked), tuple(layer[1] for layer in stacked))
