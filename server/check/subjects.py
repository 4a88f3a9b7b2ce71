"""What is checked: tasks, single versions and the bare backbone, and the digest that each has to answer with.

Owns the look at the server's own word on which version is active, before the check and again when another digest
appears: a roll-out under the check is no mix-up.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.check.asking import AskError, Server

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Subject:
    """`reference` is what a request names; `digest` and `version` are None for the backbone."""

    name: str
    reference: str
    task: str | None = None
    version: int | None = None
    digest: str | None = None
    note: str | None = None


async def find_subjects(server: Server, references: Sequence[str], *, max_found: int, seed: int) -> list[Subject]:
    """What `references` stand for now; none: up to `max_found` of the tasks that the key may call. And the backbone.

    Raises AskError.
    """
    models = (await server.get("/v1/models")).get("data")
    if not isinstance(models, list) or not all(isinstance(item, dict) and "id" in item for item in models):
        raise AskError("the server lists no models: it is not a promptmux server")
    backbone = next((str(item["id"]) for item in models if item.get("root") == item["id"]), None)
    chosen = list(dict.fromkeys(references))
    if not chosen:
        chosen = sorted(str(item["id"]) for item in models if item["id"] != backbone)
        if len(chosen) > max_found:
            chosen = random.Random(seed).sample(chosen, max_found)  # noqa: S311 - a sample, no secret
    subjects = [await _find(server, reference) for reference in chosen if reference != backbone]
    if backbone is not None:
        subjects.append(Subject(name=f"{backbone} (no prompt)", reference=backbone))
    return subjects


async def was_rolled_out(server: Server, subject: Subject, digest: str | None) -> bool:
    """Whether the server itself says that the task's roll-out has changed, and that `digest` is what it changed to."""
    if subject.task is None or subject.reference != subject.task or digest is None:
        return False
    task = await server.task(subject.task)
    named = [task.get("active_version"), (task.get("canary") or {}).get("version")]
    if named == [subject.version, None]:
        return False
    for version in named:
        if isinstance(version, int) and _digest(await server.version(subject.task, version)) == digest:
            return True
    return False


async def _find(server: Server, reference: str) -> Subject:
    task, at, pinned = reference.partition("@")
    if pinned.startswith("sha256:"):
        found = await server.get(f"/v1/models/{reference}")
        return Subject(name=reference, reference=str(found.get("id", reference)), digest=pinned.removeprefix("sha256:"))
    if at:
        if not _VERSION.fullmatch(pinned):
            raise AskError(f"{reference!r} is neither a task nor a version of one", status=400)
        version, note = int(pinned), None
    else:
        shown = await server.task(task)
        active = shown.get("active_version")
        if not isinstance(active, int):
            raise AskError(f"{task} has no active version", status=404)
        version, note = active, None
        if shown.get("canary"):
            # Its requests are answered by either of two versions: the check holds to one.
            reference, note = f"{task}@{active}", "has a canary: asked as this version"
    digest = _digest(await server.version(task, version))
    return Subject(name=reference, reference=reference, task=task, version=version, digest=digest, note=note)


def _digest(version: dict[str, Any]) -> str:
    return str(version.get("digest", "")).removeprefix("sha256:")
