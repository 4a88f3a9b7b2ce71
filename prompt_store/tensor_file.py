"""Reads safetensors files that may be hostile, with nothing but arithmetic on their bytes.

The format: eight bytes (little-endian length of the header), the header (a JSON object: name → dtype, shape, offsets),
then the tensors' bytes. The reference library accepts duplicate keys, unbounded metadata and millions of empty tensors;
none of that gets past `read_tensors`. It knows nothing of prompts: names and limits are arguments.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prompt_store.errors import UnsupportedFile
from prompt_store.names import shorten
from prompt_store.strict_json import StrictJsonError, parse_object

MAX_TENSORS = 4
MAX_DIMS = 4
MAX_METADATA_BYTES = 4 * 1024

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# Only used to say what a refused file looks like, never to accept one.
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, which is what torch.save and numpy.savez write"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"{", "JSON text"),
    (b"<", "HTML or XML text"),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(
    data: bytes, *, expected_names: Collection[str], max_header_bytes: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of `data` as float32 copies, shapes as stored; exactly `expected_names`.

    Raises UnsupportedFile for anything but a sound file: wrong length, names or dtypes, a zero dimension, offsets that
    leave gaps or overlap, numbers that are not finite.
    """
    header, body_start = _read_header(data, max_header_bytes)
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise _refused(f"it holds {len(header)} tensors; at most {MAX_TENSORS} are allowed")
    if set(header) != set(expected_names):
        found = ", ".join(sorted(shorten(name, 40) for name in header)) or "none"
        raise _refused(f"expected the tensors {', '.join(sorted(expected_names))}; found {found}")
    entries = sorted((_read_entry(name, value) for name, value in header.items()), key=lambda entry: entry.begin)
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise _refused(f"the bytes of {entry.name} start at {entry.begin}, not at {position}: a gap or an overlap")
        position = entry.end
    if body_start + position != len(data):
        raise _refused(f"it is {len(data)} bytes long, but its header describes {body_start + position}")
    return {entry.name: _read_values(data, body_start, entry) for entry in entries}


def _refused(reason: str) -> UnsupportedFile:
    return UnsupportedFile(f"The file is not an acceptable safetensors file: {reason}.", param="file")


def _read_header(data: bytes, max_header_bytes: int) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise _refused(f"it is only {len(data)} bytes long")
    length = int.from_bytes(data[:8], "little")
    if length > max_header_bytes:
        looks_like = next((what for magic, what in _MAGIC if data.startswith(magic)), None)
        hint = f"it looks like {looks_like}" if looks_like else "it does not start like one"
        raise _refused(f"{hint} (a header of {length} bytes; at most {max_header_bytes} are allowed)")
    if 8 + length > len(data):
        raise _refused(f"its header should have {length} bytes, but the file ends before")
    try:
        return parse_object(data[8 : 8 + length]), 8 + length
    except StrictJsonError as error:
        raise _refused(f"its header {error}") from error


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("__metadata__ must map strings to strings")
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for item in metadata.items() for text in item)
    if num_bytes > MAX_METADATA_BYTES:
        raise _refused(f"__metadata__ has {num_bytes} bytes; at most {MAX_METADATA_BYTES} are allowed")


def _read_entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(f"{name} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _refused(f"{name} has dtype {shorten(str(dtype), 20)}; only F32, F16 and BF16 are allowed")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMS or not all(_is_count(dim) for dim in shape):
        raise _refused(f"{name} must have 1 to {MAX_DIMS} dimensions, each a whole number")
    if 0 in shape:
        raise _refused(f"{name} has a dimension of size zero")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _refused(f"the data_offsets of {name} must be two whole numbers")
    begin, end = offsets
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != num_bytes:
        raise _refused(f"{name} needs {num_bytes} bytes, but its offsets span {end - begin}")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _is_count(value: Any) -> bool:
    # Bounded, so that a product of hostile numbers stays a number that can be printed.
    return type(value) is int and 0 <= value < 2**40


def _read_values(data: bytes, body_start: int, entry: _Entry) -> npt.NDArray[np.float32]:
    count, offset = math.prod(entry.shape), body_start + entry.begin
    if entry.dtype == "BF16":
        # NumPy has no bfloat16: it is the upper half of a float32.
        halves = np.frombuffer(data, dtype="<u2", count=count, offset=offset)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = "<f4" if entry.dtype == "F32" else "<f2"
        values = np.frombuffer(data, dtype=stored, count=count, offset=offset).astype(np.float32)
    if not np.isfinite(values).all():
        raise _refused(f"{entry.name} holds numbers that are not finite")
    return values.reshape(entry.shape)
