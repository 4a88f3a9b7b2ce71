"""Names of tasks and tenants, and references to a version of a task (`task`, `task@7`, `task@sha256:<hex>`).

Pure text: nothing here looks anything up.
"""

import re
from dataclasses import dataclass

from prompt_store.errors import InvalidName, InvalidValue, TaskNotFound

SHARED_TENANT = "shared"
DEFAULT_TENANT = "default"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# Nine digits stay inside a 32-bit column, so that no reference can overflow a database.
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. Both `version` and `digest` are None for the task's active version."""

    task: str
    version: int | None = None
    digest: str | None = None


def is_name(text: str) -> bool:
    """True for `^[a-z0-9][a-z0-9._-]{0,62}$` without `..`."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def is_digest(text: str) -> bool:
    """True for a lower-case SHA-256 in hexadecimal."""
    return _DIGEST.fullmatch(text) is not None


def check_task_name(name: str) -> str:
    """Return `name`, or raise InvalidName."""
    return _check_name(name, "task")


def check_tenant_name(name: str) -> str:
    """Return `name`, or raise InvalidName."""
    return _check_name(name, "tenant")


def _check_name(name: str, param: str) -> str:
    if not is_name(name):
        raise InvalidName(
            f"{shorten(name)!r} is not a {param} name: 1 to 63 characters of a-z, 0-9, '.', '_' and '-', starting with "
            "a letter or a digit, without '..'",
            param=param,
        )
    return name


def check_text(text: str, param: str, max_chars: int = 200) -> str:
    """Return free text that any database can hold, or raise InvalidValue."""
    if len(text) > max_chars:
        raise InvalidValue(f"{param} has {len(text)} characters; at most {max_chars} are allowed", param=param)
    if "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidValue(f"{param} holds a NUL or half a surrogate pair", param=param)
    return text


def parse_reference(text: str) -> Reference | None:
    """The parts of a reference, or None if `text` cannot be one."""
    task, separator, selector = text.partition("@")
    if not is_name(task):
        return None
    if not separator:
        return Reference(task)
    if _VERSION.fullmatch(selector):
        return Reference(task, version=int(selector))
    algorithm, _, digest = selector.partition(":")
    if algorithm == "sha256" and is_digest(digest):
        return Reference(task, digest=digest)
    return None


def not_found(reference: str) -> TaskNotFound:
    """The one error for unknown, foreign, retired and malformed references: it must not tell them apart."""
    return TaskNotFound(
        f"The model `{shorten(reference)}` does not exist or you do not have access to it.", param="model"
    )


def shorten(text: str, max_chars: int = 200) -> str:
    """Text from outside, made fit for a message: bounded, printable, encodable."""
    cut = text if len(text) <= max_chars else text[:max_chars] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)
