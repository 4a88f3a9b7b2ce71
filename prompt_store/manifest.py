"""The values that the store takes and gives: plain frozen dataclasses, no files, no SQL, no framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

PromptKind = Literal["embeddings", "prefix"]
VersionState = Literal["active", "inactive", "quarantined"]
ServingDtype = Literal["float32", "bfloat16", "float16"]

SCOPES = frozenset({"infer", "write", "admin"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneShape:
    """What a prompt must fit. `kv_heads` and `head_dim` are None when layers differ: prefixes are then refused.

    `fingerprint` is the SHA-256 (hex) of the backbone's weights; `dtype` is the one prompts are cast to when served.
    """

    name: str
    fingerprint: str
    hidden_size: int
    num_layers: int
    kv_heads: int | None
    head_dim: int | None
    dtype: ServingDtype
    max_virtual_tokens: int
    model_type: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftPrompt:
    """The numbers of one prompt, float32, finite, C-contiguous.

    kind "embeddings": `[k, hidden_size]`. kind "prefix": `[num_layers, 2, kv_heads, k, head_dim]`, index 0 of the
    second axis being keys and 1 values.
    """

    kind: PromptKind
    values: npt.NDArray[np.float32]

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.values.shape[0] if self.kind == "embeddings" else self.values.shape[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptVersion:
    """One immutable version of a task's prompt. Only `state` may differ between two looks at the same version.

    `digest` is the SHA-256 (hex) of the uploaded file, `num_bytes` its size. `task_index` is set for multi-task files
    alone. `backbone` is the fingerprint of the backbone that the upload was checked against. `prefix_key` is a stable
    string that names the digest together with how the file is read and for which backbone, so that one file read in two
    ways never shares a prefix.
    """

    tenant: str
    task: str
    version: int
    digest: str
    prefix_key: str
    peft_type: str
    kind: PromptKind
    task_index: int | None
    num_virtual_tokens: int
    num_bytes: int
    created_at: datetime
    created_by: str
    backbone: str
    state: VersionState
    metadata: Mapping[str, Any] = field(hash=False)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A name that clients call. `active_version` is None until a version is activated."""

    tenant: str
    task: str
    active_version: int | None
    pinned: bool
    created_at: datetime
    num_versions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key without its secret, which is shown once and kept only as a SHA-256."""

    id: str
    tenant: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the append-only audit log. `id` grows with time and serves as the cursor."""

    id: int
    at: datetime
    tenant: str
    actor: str
    action: str
    task: str | None
    version: int | None
    digest: str | None
    detail: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounts:
    """Totals over all tenants. `num_bytes` adds up files as uploaded, shared ones once a version."""

    num_tasks: int
    num_versions: int
    num_quarantined: int
    num_keys: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Bounds on what is accepted. The lower of this `max_virtual_tokens` and the backbone's own is in force."""

    max_file_bytes: int = 64 * 1024 * 1024
    max_config_bytes: int = 64 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_virtual_tokens: int = 512
