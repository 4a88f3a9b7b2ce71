"""What the check found, task by task."""

from dataclasses import dataclass, field
from typing import Any, Literal

from server.check.comparing import Comparison
from server.check.subjects import Subject

Verdict = Literal["same", "mismatch", "error", "changed"]
MAX_FAULTS = 10


@dataclass(slots=True)
class SubjectReport:
    """`changed`: the task was rolled out to another version meanwhile, so that there was less to compare."""

    subject: Subject
    num_mixed: int = 0
    num_near_ties: int = 0
    num_tokens: int = 0
    max_gap: float = 0.0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    changed_to: str | None = None

    @property
    def verdict(self) -> Verdict:
        if self.num_faults:
            return "mismatch"
        if self.errors:
            return "error"
        return "changed" if self.changed_to is not None else "same"

    def take(self, comparison: Comparison, where: str) -> None:
        self.num_mixed += 1
        self.num_near_ties += comparison.is_near_tie
        self.num_tokens += comparison.num_compared
        self.max_gap = max(self.max_gap, comparison.max_gap)
        if comparison.fault is not None:
            self.add_fault(f"{where}: {comparison.fault}")

    def add_fault(self, fault: str) -> None:
        """Counts it; only the first ones are kept."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.subject.name,
            "task": self.subject.task,
            "version": self.subject.version,
            "digest": self.subject.digest,
            "verdict": self.verdict,
            "mixed_answers": self.num_mixed,
            "tokens_compared": self.num_tokens,
            "near_ties": self.num_near_ties,
            "max_logprob_gap": self.max_gap,
            "num_mismatches": self.num_faults,
            "mismatches": self.faults,
            "errors": self.errors,
            "changed_to": self.changed_to,
            "note": self.subject.note,
        }


@dataclass(slots=True)
class CheckReport:
    """`alike` are pairs that answered every question alike: a mix-up between the two would not have been seen."""

    subjects: list[SubjectReport]
    dtype: str
    tolerance: float
    alike: list[tuple[str, str]]
    num_disturbed: int
    num_violations: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing was mixed up, nothing failed, and the server's own check caught nothing meanwhile."""
        return not self.num_violations and all(item.verdict in {"same", "changed"} for item in self.subjects)

    def to_json(self) -> dict[str, Any]:
        return {
            "sound": self.is_sound,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "tasks": [item.to_json() for item in self.subjects],
            "alike": [list(pair) for pair in self.alike],
            "alone_answers_disturbed": self.num_disturbed,
            "isolation_violations": self.num_violations,
        }
