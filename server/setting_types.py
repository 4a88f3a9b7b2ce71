"""The kinds of values that settings have: sizes as people write them, folders, switches."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, TypeAdapter

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_BYTE_SIZE = TypeAdapter(ByteSize)


def _parse_size(value: object) -> object:
    """Lets sizes be written as people write them: 1073741824, "1GiB", "500 MB"."""
    return int(_BYTE_SIZE.validate_python(value)) if isinstance(value, str) else value


def _expand_user(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str | Path) else value


Bytes = Annotated[int, BeforeValidator(_parse_size)]
Folder = Annotated[Path, BeforeValidator(_expand_user)]

OnOff = Literal["on", "off"]
