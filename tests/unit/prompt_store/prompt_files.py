"""Makes prompt files by hand, sound or broken, for a small backbone shape, and puts them into a store."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import delete, select, update

from prompt_store.manifest import BackboneShape, PromptVersion
from prompt_store.shared_models import BlobRow
from prompt_store.store import PromptStore

HIDDEN, LAYERS, KV_HEADS, HEAD_DIM, K = 8, 3, 2, 4, 20
PREFIX_WIDTH = LAYERS * 2 * KV_HEADS * HEAD_DIM

BACKBONE = BackboneShape(
    name="Tiny",
    fingerprint="ab" * 32,
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    dtype="float32",
    max_virtual_tokens=64,
    model_type="llama",
)

_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}


def random_embeddings(seed: int, k: int = K, width: int = HIDDEN) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, width)).astype(np.float32)


def header_for(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": _NAMES.get(tensor.dtype, "F64"),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    return header


def assemble(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def make_file(tensors: Mapping[str, np.ndarray] | None = None, *, seed: int = 0) -> bytes:
    """A sound file; uint16 arrays are taken for bfloat16."""
    tensors = tensors if tensors is not None else {"prompt_embeddings": random_embeddings(seed)}
    return assemble(header_for(tensors), b"".join(tensor.tobytes() for tensor in tensors.values()))


def make_config(**fields: Any) -> bytes:
    return json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"} | fields).encode()


def make_prefix_file(seed: int = 0, k: int = K) -> bytes:
    return make_file({"prompt_embeddings": random_embeddings(seed, k, PREFIX_WIDTH)})


def make_multitask_file(num_tasks: int = 3, num_ranks: int = 2, seed: int = 0) -> bytes:
    random = np.random.default_rng(seed)
    return make_file(
        {
            "prefix_task_cols": random.normal(size=(num_tasks, K, num_ranks)).astype(np.float32),
            "prefix_task_rows": random.normal(size=(num_tasks, num_ranks, HIDDEN)).astype(np.float32),
            "prompt_embeddings": random_embeddings(seed),
        }
    )


CONFIG = make_config()


def put(store: PromptStore, seed: int, task: str = "task", tenant: str = "acme", **options: object) -> PromptVersion:
    version, _ = store.upload(tenant, task, file=make_file(seed=seed), config=CONFIG, **options)  # type: ignore[arg-type]
    return version


def blob_path(store: PromptStore, digest: str) -> Path:
    assert store.root is not None
    return store.root / "blobs" / digest[:2] / digest


def flip_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def tamper(store: PromptStore, digest: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a blob's bytes behind the store's back; None takes it away."""
    if store.root is not None:
        path = blob_path(store, digest)
        changed = change(path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
        return
    with store._database.engine.begin() as connection:
        held = connection.scalars(select(BlobRow.data).where(BlobRow.digest == digest)).one()
        changed = change(held)
        if changed is None:
            connection.execute(delete(BlobRow).where(BlobRow.digest == digest))
        else:
            connection.execute(update(BlobRow).where(BlobRow.digest == digest).values(data=changed))


def num_blobs(store: PromptStore) -> int:
    return len(list(store._blobs.digests()))
