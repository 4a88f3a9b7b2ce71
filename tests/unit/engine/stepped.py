"""The real engine on the test's own thread: turns are taken one by one, and the loader's work is done when asked for.

Nothing depends on how threads are scheduled, so hypothesis can replay what it found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.metrics import Metrics

MAX_TURNS = 2000

OVERLAPS = "tests.unit.engine.stepped.overlaps"
"""Set by the fixture `each_way`."""

overlaps = False

Answer = SoftPrompt | Exception


def make_request(
    row_id: str, token_ids: Sequence[int] = (10, 11, 12), prompt: PromptRef | None = None, **fields: Any
) -> RowRequest:
    """Greedy and four tokens long unless the fields of SamplingParams say otherwise."""
    tenant = fields.pop("tenant", "a")
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 4, "ignore_eos": True} | fields))
    return RowRequest(row_id=row_id, tenant=tenant, token_ids=tuple(token_ids), prompt=prompt, sampling=sampling)


class SteppedEngine:
    """An engine whose store is `prompts` (by prefix key; exceptions are raised). `outputs` is what it delivered."""

    def __init__(self, backbone: Backbone, prompts: Mapping[str, Answer] | None = None, **config: Any) -> None:
        self.metrics = Metrics()
        self.prompts = dict(prompts or {})
        self.outputs: dict[str, list[RowOutput]] = {}
        self.num_deliveries = 0
        defaults: dict[str, Any] = {
            "audit_share": 0.0,
            "poison_freed_pages": True,
            "kv_cache_bytes": 8 << 20,
            "prefix_cache_bytes": 8 << 20,
            "overlaps": overlaps,
        }
        self.engine = Engine(backbone, EngineConfig(**(defaults | config)), self.metrics, self._load)
        self.engine._deliver = self.take

    def submit(self, *requests: RowRequest) -> None:
        self.engine.submit(requests)
        self.outputs.update((request.row_id, []) for request in requests)

    def load(self) -> None:
        """Do the loader thread's work: everything asked for so far is ready afterwards."""
        loader = self.engine._prefixes.loader
        loader._wanted.put(None)
        loader._run()

    def turn(self, *, load: bool = True) -> bool:
        """One turn of the loop with every invariant checked; it hands over at most once."""
        if load:
            self.load()
        before = self.num_deliveries
        worked = self.engine.run_once()
        assert self.num_deliveries - before <= 1, "more than one call of deliver in a turn"
        self.engine.check_invariants()
        return worked

    def turns_until(self, is_done: Callable[[], bool]) -> None:
        for _ in range(MAX_TURNS):
            if is_done():
                return
            self.turn()
        raise AssertionError(f"not done after {MAX_TURNS} turns: {self.engine.status()}")

    def finish(self) -> None:
        """Turns until every row has ended."""
        self.turns_until(lambda: all(self.has_ended(row_id) for row_id in self.outputs))

    def run(self, *requests: RowRequest) -> RowOutput:
        """Submit, finish, and give the first row's outputs put together."""
        self.submit(*requests)
        self.finish()
        return self.result(requests[0].row_id)

    def tokens(self, row_id: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs[row_id] for token in output.token_ids)

    def has_ended(self, row_id: str) -> bool:
        outputs = self.outputs[row_id]
        return bool(outputs) and outputs[-1].is_last

    def result(self, row_id: str) -> RowOutput:
        """All outputs of the row as if they had come at once."""
        outputs = self.outputs[row_id]
        first, last = outputs[0], outputs[-1]
        return RowOutput(
            row_id=row_id,
            text="".join(output.text for output in outputs),
            token_ids=self.tokens(row_id),
            logprobs=tuple(entry for output in outputs for entry in output.logprobs),
            prompt_logprobs=first.prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
        )

    def is_idle(self) -> bool:
        """Whether nothing of any row is left: counters at zero, no slot, no user of a prefix."""
        status = self.engine.status()
        counters = (status.num_running, status.num_waiting, status.kv_usage_ratio)
        return counters == (0, 0, 0.0) and not self.engine._prefixes.device.num_users and not self.engine._rows

    def count(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"promptmux_{metric}", labels) or 0.0

    def take(self, outputs: Sequence[RowOutput]) -> None:
        assert outputs, "deliver was called with nothing new"
        self.num_deliveries += 1
        for output in outputs:
            taken = self.outputs[output.row_id]
            assert not (taken and taken[-1].is_last), f"row {output.row_id} was given more after its end"
            taken.append(output)

    def _load(self, ref: PromptRef) -> SoftPrompt:
        answer = self.prompts[ref.prefix_key]
        if isinstance(answer, Exception):
            raise answer
        return answer
