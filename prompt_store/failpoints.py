"""Places where a test may stop the store on purpose, to show that no instant loses acknowledged work.

`PROMPTMUX_FAILPOINT=name:action` arms one of them. Actions: `kill` (SIGKILL to this process, as a power cut would) and
`raise` (a FailpointReached, as an unforeseen bug would). Unset, a failpoint is one look at a module global.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

BLOB_TEMP_WRITTEN = "blob.temp_written"
BLOB_RENAMED = "blob.renamed"
UPLOAD_CONFIG_STORED = "upload.config_stored"
UPLOAD_FILE_STORED = "upload.file_stored"
UPLOAD_PROBES_STORED = "upload.probes_stored"
UPLOAD_BEFORE_COMMIT = "upload.before_commit"
UPLOAD_COMMITTED = "upload.committed"
ACTIVATE_BEFORE_COMMIT = "activate.before_commit"
ACTIVATE_COMMITTED = "activate.committed"
DELETE_BEFORE_COMMIT = "delete.before_commit"
DELETE_COMMITTED = "delete.committed"
DELETE_BLOB_REMOVED = "delete.blob_removed"

UPLOAD_FAILPOINTS = (
    BLOB_TEMP_WRITTEN,
    BLOB_RENAMED,
    UPLOAD_CONFIG_STORED,
    UPLOAD_FILE_STORED,
    UPLOAD_PROBES_STORED,
    UPLOAD_BEFORE_COMMIT,
    UPLOAD_COMMITTED,
)
ACTIVATE_FAILPOINTS = (ACTIVATE_BEFORE_COMMIT, ACTIVATE_COMMITTED)
DELETE_FAILPOINTS = (DELETE_BEFORE_COMMIT, DELETE_COMMITTED, DELETE_BLOB_REMOVED)
ALL_FAILPOINTS = UPLOAD_FAILPOINTS + ACTIVATE_FAILPOINTS + DELETE_FAILPOINTS

ENVIRONMENT_VARIABLE = "PROMPTMUX_FAILPOINT"


class FailpointReached(RuntimeError):  # noqa: N818
    """Raised by the action `raise`. Deliberately not a PromptStoreError: it stands for what nobody foresaw."""


def _parse(spec: str) -> tuple[str, str]:
    name, _, action = spec.partition(":")
    if name not in ALL_FAILPOINTS or action not in ("kill", "raise"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={spec!r}: expected one of {', '.join(ALL_FAILPOINTS)}, then ':kill' or ':raise'"
        )
    return name, action


_spec = os.environ.get(ENVIRONMENT_VARIABLE)
_armed: tuple[str, str] | None = _parse(_spec) if _spec else None


@contextmanager
def armed(spec: str | None) -> Iterator[None]:
    """Arm `name:action` (None: nothing) for a block, in all threads. Raises ValueError for unknown words."""
    global _armed
    before, _armed = _armed, None if spec is None else _parse(spec)
    try:
        yield
    finally:
        _armed = before


def hit(name: str) -> None:
    """Do what is armed for `name`; nothing otherwise."""
    if _armed is None or _armed[0] != name:
        return
    if _armed[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise FailpointReached(name)
