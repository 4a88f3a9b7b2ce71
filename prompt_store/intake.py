"""Bounds and plain checks on what an upload brings, before anything looks inside the files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prompt_store.errors import FileTooLarge, InvalidValue
from prompt_store.faults import storage_errors
from prompt_store.manifest import Gate

# The escape of a NUL character, and not the escape of a backslash in front of the text u0000.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_upload(file: bytes | Path, max_bytes: int) -> bytes:
    """The bytes of the uploaded file, never more than allowed. Raises FileTooLarge or StorageFailed."""
    if isinstance(file, Path):
        with storage_errors(), file.open("rb") as stream:
            # One byte more than allowed tells a file that is too large, also one that never ends.
            file = stream.read(max_bytes + 1)
    check_size("The file", file, max_bytes, "file")
    return file


def check_size(what: str, data: bytes, max_bytes: int, param: str) -> None:
    """Raises FileTooLarge."""
    if len(data) > max_bytes:
        raise FileTooLarge(f"{what} has more than the {max_bytes} bytes that are allowed.", param=param)


def check_metadata(metadata: Mapping[str, Any] | None, max_bytes: int, param: str = "metadata") -> Mapping[str, Any]:
    """A private copy of `metadata`, which must be a JSON object. Raises InvalidValue or FileTooLarge."""
    if metadata is None:
        return MappingProxyType({})
    try:
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"{param} must be a JSON object of finite numbers and sound text.", param=param) from error
    check_size(param, data, max_bytes, param)
    if _NUL.search(text):
        raise InvalidValue(f"{param} must not hold NUL characters.", param=param)
    return MappingProxyType(json.loads(text))


def make_gate(threshold: float | None, num_probes: int, *, activates: bool) -> Gate | None:
    """The gate that an upload asks for, None if it asks for none. Raises InvalidValue."""
    if threshold is None:
        return None
    if not 0 <= threshold <= 1:
        raise InvalidValue("gate_threshold must be from 0 to 1.", param="gate_threshold")
    if num_probes == 0:
        raise InvalidValue("gate_threshold needs probes to be measured by.", param="probes")
    return Gate(threshold=threshold, status="pending", num_probes=num_probes, activates=activates, expected_version=0)
