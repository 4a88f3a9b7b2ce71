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
GateStatus = Literal["pending", "running", "passed", "failed", "conflict", "error"]

SCOPES = frozenset({"infer", "write", "admin"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneShape:
    """What a prompt must fit. `kv_heads` and `head_dim` are None when layers differ: prefixes are then refused.

    `fingerprint` is the SHA-256 (hex) of the backbone's weights; `dtype` is the one prompts are cast to when served.
    `num_parameters` and the mean and standard deviation of the norms of the vocabulary's embeddings are what warnings
    are measured by; None, where unknown, gives none.
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
    num_parameters: int | None = None
    embedding_norm_mean: float | None = None
    embedding_norm_std: float | None = None


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
class Provenance:
    """Where a version comes from. None is what the uploader, or the release that stored it, did not say."""

    training_run: str | None
    data_digest: str | None
    key_id: str | None
    key_label: str | None
    uploaded_at: datetime
    backbone_name: str | None
    backbone_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The condition under which a version may become active, and how far its check has come.

    `activates`: on passing, the version is made active if `expected_version` (0: none) is still the active one. `score`
    is the share of `num_probes` answered as expected, None until known; `detail` holds what the check has to tell.
    """

    threshold: float
    status: GateStatus
    num_probes: int
    activates: bool
    expected_version: int
    score: float | None = None
    finished_at: datetime | None = None
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptVersion:
    """One immutable version of a task's prompt. Only `state` and `gate` may differ between two looks at one version.

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
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    gate: Gate | None = None
    probes_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers `percent` (1 to 99) of the requests that name the task alone."""

    version: int
    percent: int


CanaryChange = Canary | Literal["keep"] | None
"""None takes a canary away; "keep" leaves things as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A name that clients call. `active_version` is None until a version is activated."""

    tenant: str
    task: str
    active_version: int | None
    pinned: bool
    created_at: datetime
    num_versions: int
    canary: Canary | None = None


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
class Quota:
    """What a tenant may use; None leaves a limit to whoever asks. `updated_at` is None for one that is not stored."""

    tenant: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running_rows: int | None = None
    max_prompts: int | None = None
    max_prompt_bytes: int | None = None
    max_virtual_tokens: int | None = None
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAmounts:
    """What one tenant has stored: versions, the bytes of their files, their virtual tokens."""

    num_prompts: int = 0
    num_bytes: int = 0
    num_virtual_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Which prompt answered a request: one for each prompt of the request. `id` is None until it is stored.

    `owner`, `task`, `version` and `digest` are None together, for the bare backbone.
    """

    at: datetime
    request_id: str
    tenant: str
    key_id: str | None
    endpoint: str
    owner: str | None
    task: str | None
    version: int | None
    digest: str | None
    num_rows: int
    prompt_tokens: int
    completion_tokens: int
    outcome: str
    id: int | None = None


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
    max_probes_bytes: int = 1024 * 1024
    max_probes: int = 1000
