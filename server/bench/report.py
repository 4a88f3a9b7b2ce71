"""What a benchmark has to say: tables for people, and one JSON document that others can compare with.

Owns names and units of the results. Refuses to know how they are shown or where they are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.bench.profiling import Operator
from server.bench.server_metrics import StepStats
from server.bench.summary import PERCENTILES, Distribution, Slo, Summary

SCHEMA_VERSION = 1
TOP_OPERATORS = 15
_LATENCY_NAMES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end to end",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The first column's heading is the table's title. Cells are text already."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`target`, `options` and `environment` say what was measured, with what load, and where; no secrets."""

    mode: Literal["offline", "online"]
    date: str
    seed: int
    target: Mapping[str, Any]
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Summary
    slo: Slo
    steps: StepStats | None
    operators: Sequence[Operator] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; times in milliseconds where the name ends in `_ms`, else in seconds."""
        summary = self.summary
        return {
            "benchmark": "promptmux bench",
            "schema_version": SCHEMA_VERSION,
            "mode": self.mode,
            "date": self.date,
            "seed": self.seed,
            "target": dict(self.target),
            "options": dict(self.options),
            **self.environment,
            "is_profiled": self.operators is not None,
            "requests": {
                "total": summary.num_requests,
                "failed": summary.num_failed,
                "failures": dict(summary.failures),
                "failure_messages": dict(summary.failure_messages),
                "max_in_flight": summary.max_in_flight,
                "max_send_lag_ms": _ms(summary.max_lag_s),
                "distinct_prompts": summary.num_distinct_prompts,
            },
            "tokens": {
                "prompt": summary.prompt_tokens,
                "prompt_cached": summary.cached_prompt_tokens,
                "new": summary.new_tokens,
                "new_of_failed": summary.new_tokens_of_failed,
            },
            "wall_s": round(summary.wall_s, 6),
            "requests_per_s": round(summary.requests_per_s, 4),
            "new_tokens_per_s": round(summary.new_tokens_per_s, 3),
            "total_tokens_per_s": round(summary.total_tokens_per_s, 3),
            "latency_ms": {name: _distribution(found) for name, found in summary.latencies.items()},
            "goodput": self._goodput(),
            "steps": self._steps(),
            "operators": None if self.operators is None else [_operator(item) for item in self.operators],
        }

    def tables(self) -> list[Table]:
        """Everything that was measured, most important first; tables without rows are left out."""
        found = [self._overview(), self._latencies(), self._failures(), self._step_table(), self._operator_table()]
        return [table for table in found if table.rows]

    def _overview(self) -> Table:
        summary = self.summary
        rows = [
            ("requests that ended well", f"{summary.num_requests - summary.num_failed} of {summary.num_requests}"),
            ("wall time", f"{summary.wall_s:.2f} s"),
            ("requests/s", f"{summary.requests_per_s:.2f}"),
            ("new tokens/s", f"{summary.new_tokens_per_s:.1f}"),
            ("prompt and new tokens/s", f"{summary.total_tokens_per_s:.1f}"),
        ]
        if summary.goodput is not None:
            share = (summary.num_good or 0) / summary.num_requests if summary.num_requests else 0.0
            rows.append(("goodput", f"{summary.goodput:.2f} requests/s ({share:.1%} within {self._slo_text()})"))
        rows += [
            ("most requests at once", str(summary.max_in_flight)),
            ("distinct prompts", str(summary.num_distinct_prompts)),
        ]
        if summary.cached_prompt_tokens:
            rows.append(("prompt tokens from the cache", f"{summary.cached_prompt_tokens} of {summary.prompt_tokens}"))
        return Table(columns=(self.mode, "measured"), rows=rows)

    def _latencies(self) -> Table:
        rows = []
        for name, found in self.summary.latencies.items():
            if found is not None:
                values = (found.mean, *found.percentiles.values(), found.max)
                rows.append((_LATENCY_NAMES[name], *(f"{value * 1e3:.2f}" for value in values)))
        return Table(columns=("latency, ms", "mean", *(f"p{p}" for p in PERCENTILES), "max"), rows=rows)

    def _failures(self) -> Table:
        summary = self.summary
        rows = [(kind, str(count), summary.failure_messages[kind]) for kind, count in summary.failures.items()]
        return Table(columns=("failed with", "requests", "the first of them"), rows=rows)

    def _step_table(self) -> Table:
        steps = self.steps
        if steps is None:
            return Table(columns=(), rows=())
        wall_s = self.summary.wall_s
        rows = [
            (phase, f"{seconds / steps.num_steps * 1e3:.3f}", f"{seconds / wall_s:.1%}" if wall_s else "-")
            for phase, seconds in steps.phases_s.items()
        ]
        rows += [
            (f"{steps.num_steps} steps", "", ""),
            (f"{steps.mean_rows:.1f} rows a step", "", ""),
            (f"{steps.mean_distinct_prompts:.1f} distinct prompts a step", "", ""),
            (f"{steps.num_prompt_loads} prompts loaded and compiled", "", ""),
            (f"{steps.num_preemptions} preemptions", "", ""),
        ]
        if steps.num_isolation_violations:
            rows.append((f"{steps.num_isolation_violations} ISOLATION VIOLATIONS", "", ""))
        return Table(columns=("engine", "ms a step", "of the wall time"), rows=rows)

    def _operator_table(self) -> Table:
        operators = self.operators or ()
        total_s = sum(item.self_cpu_s for item in operators)
        has_device = any(item.self_device_s is not None for item in operators)
        rows = []
        for item in operators[:TOP_OPERATORS]:
            device = (f"{(item.self_device_s or 0.0) * 1e3:.1f}",) if has_device else ()
            share = item.self_cpu_s / total_s if total_s else 0.0
            rows.append((item.name, str(item.num_calls), f"{item.self_cpu_s * 1e3:.1f}", f"{share:.1%}", *device))
        columns = ("operator, by self CPU time", "calls", "ms", "of all", *(("device ms",) if has_device else ()))
        return Table(columns=columns, rows=rows)

    def _goodput(self) -> dict[str, Any] | None:
        if self.summary.num_good is None:
            return None
        return {
            "slo_ttft_ms": None if self.slo.ttft_s is None else _ms(self.slo.ttft_s),
            "slo_itl_ms": None if self.slo.itl_s is None else _ms(self.slo.itl_s),
            "good_requests": self.summary.num_good,
            "requests_per_s": round(self.summary.goodput or 0.0, 4),
        }

    def _steps(self) -> dict[str, Any] | None:
        steps = self.steps
        if steps is None:
            return None
        return {
            "count": steps.num_steps,
            "mean_phase_ms": {phase: _ms(s / steps.num_steps) for phase, s in steps.phases_s.items()},
            "mean_rows": round(steps.mean_rows, 3),
            "mean_distinct_prompts": round(steps.mean_distinct_prompts, 3),
            "prompt_loads": steps.num_prompt_loads,
            "preemptions": steps.num_preemptions,
            "isolation_violations": steps.num_isolation_violations,
        }

    def _slo_text(self) -> str:
        limits = (("TTFT", self.slo.ttft_s), ("ITL", self.slo.itl_s))
        return ", ".join(f"{name} {limit * 1e3:g} ms" for name, limit in limits if limit is not None)


def _distribution(found: Distribution | None) -> dict[str, float] | None:
    if found is None:
        return None
    points = {f"p{p}": _ms(value) for p, value in found.percentiles.items()}
    return {"count": found.count, "mean": _ms(found.mean), **points, "max": _ms(found.max)}


def _operator(item: Operator) -> dict[str, Any]:
    return {
        "name": item.name,
        "calls": item.num_calls,
        "self_cpu_ms": _ms(item.self_cpu_s),
        "self_device_ms": None if item.self_device_s is None else _ms(item.self_device_s),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
