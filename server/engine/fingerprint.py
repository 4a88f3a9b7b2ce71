"""The backbone's digest: SHA-256 over its weights' names, shapes, dtypes and bytes, as they are stored.

It is taken of the safetensors files and not of the loaded tensors, so that it does not depend on the serving dtype.
Hashing takes about a second a gigabyte; the result is cached, keyed by the files' names, sizes and modification times.
"""

import hashlib
import json
import secrets
from pathlib import Path

import torch
from safetensors import safe_open


class FingerprintError(RuntimeError):
    """The folder holds no safetensors weights."""


def fingerprint_folder(folder: Path, cache_dir: Path | None) -> str:
    """SHA-256 (hex) of the weights in `folder`. Raises FingerprintError when there are none in safetensors format."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FingerprintError(f"{folder} holds no .safetensors weights (pickled weights are never loaded)")
    key = hashlib.sha256(
        json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]).encode()
    ).hexdigest()
    cached = cache_dir / "fingerprints" / key if cache_dir is not None else None
    if cached is not None and cached.exists():
        text = cached.read_text().strip()
        if len(text) == 64:
            return text
    digest = _hash_weights(files)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another server may be hashing the same weights.
        temporary = cached.with_name(f"{key}.{secrets.token_hex(4)}.tmp")
        temporary.write_text(digest)
        temporary.replace(cached)
    return digest


def _hash_weights(files: list[Path]) -> str:
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))
    digest = hashlib.sha256()
    handles = {file: safe_open(file, framework="pt") for file in files}
    for name in sorted(where):
        with_file = handles[where[name]]
        tensor: torch.Tensor = with_file.get_tensor(name)  # type: ignore[no-untyped-call]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
