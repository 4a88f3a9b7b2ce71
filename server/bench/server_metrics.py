"""What a server's own metrics say about the time between two looks at them.

Owns which of the metrics a benchmark shows. Refuses to know where their text came from: `/metrics`, or a registry in
this process. Other clients of the same server are in these numbers too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import PREFIX

_Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Steps between two looks. `phases_s` has each phase's seconds, all steps together, in the order of a step."""

    num_steps: int
    phases_s: Mapping[str, float]
    mean_rows: float
    mean_distinct_prompts: float
    num_prompt_loads: int
    num_preemptions: int
    num_isolation_violations: int

    @classmethod
    def between(cls, before: str, after: str) -> "StepStats | None":
        """From the exposition text of both looks; None when no step was made, or the metrics are not promptmux's."""
        earlier, later = _read(before), _read(after)

        def grown(name: str, **labels: str) -> float:
            key = (PREFIX + name, frozenset(labels.items()))
            return later.get(key, 0.0) - earlier.get(key, 0.0)

        num_steps = round(grown("batch_rows_count"))
        if num_steps <= 0:
            return None
        phases = [dict(labels)["phase"] for name, labels in later if name == f"{PREFIX}step_seconds_count"]
        return cls(
            num_steps=num_steps,
            phases_s={phase: grown("step_seconds_sum", phase=phase) for phase in phases},
            mean_rows=grown("batch_rows_sum") / num_steps,
            mean_distinct_prompts=grown("batch_distinct_prompts_sum") / num_steps,
            num_prompt_loads=round(grown("prompt_load_seconds_count")),
            num_preemptions=round(grown("num_preemptions_total")),
            num_isolation_violations=round(grown("isolation_violations_total")),
        )


def _read(text: str) -> _Samples:
    """Raises ValueError when it is no exposition text."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
