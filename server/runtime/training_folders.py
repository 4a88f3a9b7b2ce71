"""The folder in which jobs keep how far they are: one a job, and this server's own name among the runners.

What is kept of a job is of one backbone: over another it is no beginning. A folder whose job has ended is removed, at
once or, where the server was killed in between, by a later sweep. Blocking.
"""

import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

_NAME = "runner"
_DIGITS = 12


class TrainingFolders:
    def __init__(self, root: Path, fingerprint: str) -> None:
        """`fingerprint` is the backbone's."""
        self._root = root
        self._suffix = fingerprint[:_DIGITS]

    def runner_name(self) -> str:
        """The same at each start over this folder: so a server knows what it had in hand when it was killed."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._root / _NAME
        name = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if not name:
            name = uuid.uuid4().hex
            # Whole or not at all: two servers of one name would take each other's jobs for their own.
            temporary = path.with_suffix(".new")
            temporary.write_text(name, encoding="ascii")
            temporary.replace(path)
        return name

    def of(self, job_id: str) -> Path:
        return self._root / f"{job_id}.{self._suffix}"

    def remove(self, job_id: str) -> None:
        shutil.rmtree(self.of(job_id), ignore_errors=True)

    def sweep(self, needed: Collection[str]) -> None:
        """Remove the folders of all jobs but those."""
        for path in self._root.iterdir():
            if path.is_dir() and path.name.partition(".")[0] not in needed:
                shutil.rmtree(path, ignore_errors=True)
