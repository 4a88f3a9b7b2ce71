"""Runs rows through the real engine and collects what it delivers.

Steps are taken on the test's own thread, so that a test says exactly what happens between two of them; only the prompt
loader has a thread, as in the server.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams, TokenLogprob
from server.engine.row import Row
from server.errors import PromptmuxError
from server.metrics import Metrics
from tests.factories import MadePrompt

NUM_ALTERNATIVES = 3
GIVE_UP_AFTER_S = 120.0

OVERLAPS = "tests.integration.isolation.driver.overlaps"
"""Set by the fixture `each_way`."""

overlaps = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to ask for: greedy unless `temperature` says otherwise, with all log-probabilities."""

    row_id: str
    prompt: str | None
    token_ids: tuple[int, ...]
    max_tokens: int = 8
    prompt_logprobs: bool = True
    temperature: float = 0.0
    seed: int | None = None
    tenant: str = "default"


@dataclass(slots=True)
class RowResult:
    """All that was delivered for one row."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: str | None = None
    error: PromptmuxError | None = None

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def add(self, output: RowOutput) -> None:
        if self.has_ended:
            raise AssertionError(f"row {output.row_id} was given more after its end")
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs or ()
        self.finish_reason, self.error = output.finish_reason, output.error


class EngineDriver:
    """An engine on the test's thread. Use as a context manager; `config` are fields of EngineConfig.

    Freed pages are poisoned with NaN unless the test says otherwise: what reads them cannot go unnoticed.
    """

    def __init__(self, backbone: Backbone, prompts: Mapping[str, MadePrompt], **config: Any) -> None:
        self.metrics = Metrics()
        self.results: dict[str, RowResult] = {}
        self.num_loads = 0
        self.most_rows = 0
        self._prompts = prompts
        self._by_key = {prompt.ref.prefix_key: prompt.soft_prompt for prompt in prompts.values()}
        # Room for the longest row and a full batch of short ones.
        kv_bytes = (64 * 128 + backbone.max_model_len) * backbone.bytes_per_token
        defaults: dict[str, Any] = {
            "audit_share": 0.0,
            "poison_freed_pages": True,
            "kv_cache_bytes": kv_bytes,
            "prefix_cache_bytes": 4 * 512 * backbone.bytes_per_token,
            "overlaps": overlaps,
        }
        self.engine = Engine(backbone, EngineConfig(**(defaults | config)), self.metrics, self._load_prompt)
        self.engine._deliver = self._take

    def __enter__(self) -> "EngineDriver":
        self.engine._prefixes.loader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.engine.stop(timeout_s=10)

    def submit(self, cases: Iterable[Case]) -> None:
        requests = [self.request(case) for case in cases]
        self.results.update((request.row_id, RowResult()) for request in requests)
        self.engine.submit(requests)

    def make_resident(self, names: Iterable[str] | None = None) -> None:
        """Bring prompts onto the device (None: all), so that rows submitted together are admitted together."""
        refs = [self._prompts[name].ref for name in (names if names is not None else self._prompts)]
        self.engine.pin(refs)
        self.run_until(lambda: all(self.engine.residency(ref.prefix_key) == "device" for ref in refs))
        self.engine.pin([])

    def request(self, case: Case) -> RowRequest:
        return RowRequest(
            row_id=case.row_id,
            tenant=case.tenant,
            token_ids=case.token_ids,
            prompt=self._prompts[case.prompt].ref if case.prompt is not None else None,
            sampling=SamplingParams(
                max_tokens=case.max_tokens,
                temperature=case.temperature,
                seed=case.seed,
                logprobs=NUM_ALTERNATIVES,
                prompt_logprobs=NUM_ALTERNATIVES if case.prompt_logprobs else None,
            ),
        )

    def step(self) -> bool:
        """One turn of the loop, with every invariant checked after it."""
        worked = self.engine.run_once()
        self.engine.check_invariants()
        self.most_rows = max(self.most_rows, self.engine.status().num_running)
        return worked

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Take turns until `is_done`; waits for the prompt loader when there is nothing else to do."""
        give_up_at_s = time.monotonic() + GIVE_UP_AFTER_S
        while not is_done():
            if not self.step():
                self.engine._commands.wait(0.05)
            if time.monotonic() > give_up_at_s:
                raise AssertionError(f"not done after {GIVE_UP_AFTER_S} s: {self.engine.status()}")

    def finish(self, *row_ids: str) -> dict[str, RowResult]:
        """Run until these rows have ended; every submitted row when none is named."""
        awaited = row_ids or tuple(self.results)
        self.run_until(lambda: all(self.results[row_id].has_ended for row_id in awaited))
        return self.results

    def run(self, cases: Iterable[Case]) -> dict[str, RowResult]:
        self.submit(cases)
        return self.finish()

    def run_alone(self, case: Case) -> RowResult:
        """The row as a batch of one: nothing else is in the engine meanwhile."""
        return self.run([case])[case.row_id]

    def row(self, row_id: str) -> Row:
        """The engine's own row, for tests that break it on purpose."""
        return self.engine._rows[row_id]

    def count(self, metric: str, **labels: str) -> float:
        """The value of a counter, named without its prefix."""
        return self.metrics.registry.get_sample_value(f"promptmux_{metric}", labels) or 0.0

    def _load_prompt(self, ref: PromptRef) -> SoftPrompt:
        self.num_loads += 1
        return self._by_key[ref.prefix_key]

    def _take(self, outputs: Sequence[RowOutput]) -> None:
        for output in outputs:
            self.results[output.row_id].add(output)
