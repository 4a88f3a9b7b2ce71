"""The isolation audit: a sampled share of finished rows is run again, alone, by the model's own attention.

The replay shares nothing with the way the row was served: the prompt is read from the store again, its vectors are
prepended to the input embeddings (or its keys and values fill a transformers cache), there is no page, no plan and no
batch. The log-probabilities of the tokens that the row was given are compared with those recorded when it was served.
A row that was answered with another prompt, or that read another row's keys, differs by whole nats; rounding in bf16
by hundredths.
"""

import logging
import zlib
from collections import deque
from dataclasses import dataclass

import torch

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.kv import KeysValues
from server.engine.request import PromptRef
from server.engine.row import Row
from server.engine.sampler import uniform
from server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_PENDING = 32
STEPS_BETWEEN_RUNS = 32

MAX_TOKENS = 1024
"""Longer rows, virtual tokens included, are not replayed: one pass over them would hold up everyone's next token."""

TOLERANCE_NATS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Largest mean difference of a row's log-probabilities that is still put down to rounding."""


@dataclass(frozen=True, slots=True)
class AuditJob:
    """A finished row: its prompt, all its tokens, and the log-probabilities recorded for the generated ones."""

    row_id: str
    prompt: PromptRef | None
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AuditResult:
    """`difference_nats` is the mean absolute difference of log-probabilities over the generated tokens."""

    job: AuditJob
    difference_nats: float
    passed: bool


class Auditor:
    """Chooses rows, keeps them until their prompt has been read again, and replays them. Engine thread only."""

    def __init__(self, backbone: Backbone, share: float, metrics: Metrics) -> None:
        self._backbone = backbone
        self._share = share
        self._metrics = metrics
        self._ready: deque[tuple[AuditJob, SoftPrompt | None]] = deque()
        self._steps_since_run = 0
        self._awaiting: dict[str, list[AuditJob]] = {}
        self.last_result: AuditResult | None = None

    def selects(self, row_id: str) -> bool:
        """Whether the row is in the sampled share: decided by its id, before anything is known of it."""
        return uniform(zlib.crc32(row_id.encode()), 0) < self._share

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_pending(self) -> int:
        return len(self._ready) + sum(len(jobs) for jobs in self._awaiting.values())

    def add(self, row: Row) -> PromptRef | None:
        """Take a finished row in. Returns the prompt that has to be read again for it, if any."""
        if not row.audit_logprobs:
            return None
        if self.num_pending >= MAX_PENDING or row.num_virtual_tokens + len(row.token_ids) > MAX_TOKENS:
            self._metrics.isolation_audits_total.labels(result="skipped").inc()
            return None
        job = AuditJob(
            row.row_id, row.request.prompt, tuple(row.token_ids), row.num_prompt_tokens, tuple(row.audit_logprobs)
        )
        if job.prompt is None:
            self._ready.append((job, None))
            return None
        self._awaiting.setdefault(job.prompt.prefix_key, []).append(job)
        return job.prompt

    def supply(self, ref: PromptRef, prompt: SoftPrompt | None) -> None:
        """The prompt was read again, or could not be (deleted meanwhile): its rows are then not audited."""
        for job in self._awaiting.pop(ref.prefix_key, []):
            if prompt is None:
                self._metrics.isolation_audits_total.labels(result="skipped").inc()
            else:
                self._ready.append((job, prompt))

    def run_sometimes(self, *, is_idle: bool) -> bool:
        """Replay a row when nothing else is to be done, and now and then when there always is. Called once a step."""
        self._steps_since_run += 1
        if not self._ready or not (is_idle or self._steps_since_run >= STEPS_BETWEEN_RUNS):
            return False
        self._steps_since_run = 0
        self.run_one()
        return True

    def run_one(self) -> AuditResult | None:
        """Replay one row, if any is ready. Costs one forward pass of that row. Never raises: rows are being served."""
        if not self._ready:
            return None
        job, prompt = self._ready.popleft()
        try:
            result = self._replay(job, prompt)
        except Exception:
            logger.exception("the audit of row %s could not be run", job.row_id)
            self._metrics.isolation_audits_total.labels(result="error").inc()
            return None
        self.last_result = result
        self._metrics.isolation_audits_total.labels(result="match" if result.passed else "mismatch").inc()
        if not result.passed:
            digest = job.prompt.digest if job.prompt is not None else None
            logger.critical(
                "isolation audit failed: row %s, digest %s, mean difference %.3f nats",
                job.row_id, digest, result.difference_nats,
            )  # fmt: skip
        return result

    def _replay(self, job: AuditJob, prompt: SoftPrompt | None) -> AuditResult:
        vectors, prefix = self._as_tensors(prompt)
        num_generated = len(job.token_ids) - job.num_prompt_tokens
        logits = self._backbone.reference(job.token_ids[:-1], vectors=vectors, prefix=prefix, num_logits=num_generated)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        generated = torch.tensor(job.token_ids[job.num_prompt_tokens :], device=logprobs.device)
        expected = logprobs.gather(1, generated[:, None])[:, 0]
        recorded = torch.tensor(job.logprobs, device=logprobs.device)
        difference = float((expected - recorded).abs().mean())
        return AuditResult(job, difference, difference <= TOLERANCE_NATS[self._backbone.dtype])

    def _as_tensors(self, prompt: SoftPrompt | None) -> tuple[torch.Tensor | None, KeysValues | None]:
        if prompt is None:
            return None, None
        values = torch.from_numpy(prompt.values).to(device=self._backbone.device, dtype=self._backbone.dtype)
        if prompt.kind == "embeddings":
            return values, None
        return None, KeysValues(tuple(layer[0] for layer in values), tuple(layer[1] for layer in values))
