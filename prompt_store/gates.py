"""The gate of a version: how it is kept in a row, what changes it, and whether it lets the version become active.

Knows nothing of how a version is tried: whoever does that reports here.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from prompt_store.errors import GateNotPassed, InvalidValue, VersionConflict
from prompt_store.manifest import Gate, GateStatus, PromptVersion
from prompt_store.models import TaskRow, VersionRow

UNFINISHED: frozenset[GateStatus] = frozenset({"pending", "running"})


def read_gate(row: VersionRow) -> Gate | None:
    if row.gate is None:
        return None
    finished_at = row.gate["finished_at"]
    return Gate(
        threshold=row.gate["threshold"],
        status=row.gate["status"],
        num_probes=row.gate["num_probes"],
        activates=row.gate["activates"],
        expected_version=row.gate["expected_version"],
        score=row.gate["score"],
        finished_at=None if finished_at is None else datetime.fromisoformat(finished_at),
        detail=MappingProxyType(row.gate["detail"]),
    )


def without_detail(version: PromptVersion) -> PromptVersion:
    """The version as it is, but for what its gate's check has to tell."""
    if version.gate is None or not version.gate.detail:
        return version
    return replace(version, gate=replace(version.gate, detail=MappingProxyType({})))


def write_gate(row: VersionRow, gate: Gate) -> None:
    row.gate = {
        "threshold": gate.threshold,
        "status": gate.status,
        "num_probes": gate.num_probes,
        "activates": gate.activates,
        "expected_version": gate.expected_version,
        "score": gate.score,
        "finished_at": None if gate.finished_at is None else gate.finished_at.isoformat(),
        "detail": dict(gate.detail),
    }


def is_same_request(task: TaskRow, row: VersionRow, gate: Gate | None, probes_digest: str | None) -> bool:
    """Whether an upload of the version's own bytes asks nothing new of its probes and its gate."""
    held = read_gate(row)
    if gate is None:
        # Probes that a gate was measured by stay what they were.
        return probes_digest is None or held is not None or row.probes_digest == probes_digest
    if task.active_version == row.version:
        return True
    if held is None or row.probes_digest != probes_digest:
        return False
    if (held.threshold, held.activates) != (gate.threshold, gate.activates):
        return False
    return held.status in UNFINISHED or (held.status == "passed" and not held.activates)


def may_answer(row: VersionRow) -> bool:
    """Whether the gate, if there is one, lets the version answer requests.

    A gate that ended in `conflict` was passed: only the activation was lost, to someone who was quicker.
    """
    gate = read_gate(row)
    return gate is None or gate.status in ("passed", "conflict")


def check_gate(task: TaskRow, row: VersionRow) -> None:
    """Raises GateNotPassed unless the version may answer requests."""
    gate = read_gate(row)
    if gate is not None and not may_answer(row):
        raise GateNotPassed(
            f"Version {row.version} of {task.name} has a gate with threshold {gate.threshold:g} that it has not "
            f"passed: its status is {gate.status}.",
            param="active_version",
        )


def check_measured(task: TaskRow, row: VersionRow, measured: PromptVersion) -> None:
    """Raises VersionConflict when the gate, or the probes, are not those that `measured` had, or it has ended."""
    gate, before = read_gate(row), measured.gate
    if (
        gate is None
        or before is None
        or gate.status not in UNFINISHED
        or (gate.threshold, gate.activates, row.probes_digest)
        != (before.threshold, before.activates, measured.probes_digest)
    ):
        raise VersionConflict(
            f"The gate of version {row.version} of {task.name} was set anew, or ended, while it was being checked.",
            param="version",
        )


def move_gate(
    task: TaskRow, row: VersionRow, status: GateStatus, score: float | None, detail: Mapping[str, Any]
) -> Gate:
    """The gate with a new status. Raises InvalidValue for a version without one."""
    gate = read_gate(row)
    if gate is None:
        raise InvalidValue(f"Version {row.version} of {task.name} has no gate.", param="version")
    if status in UNFINISHED:
        begins_anew = gate.status not in UNFINISHED
        expected = (task.active_version or 0) if begins_anew else gate.expected_version
        moved = replace(gate, status=status, score=None, finished_at=None, detail=detail, expected_version=expected)
    else:
        moved = replace(gate, status=status, score=score, finished_at=datetime.now(UTC), detail=detail)
    write_gate(row, moved)
    return moved
