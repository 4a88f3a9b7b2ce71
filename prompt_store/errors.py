"""The error tree of the prompt store. Whoever serves the store maps each class to its own protocol; nothing here
knows about HTTP.

    PromptStoreError
    ├── InvalidValue            an argument is wrong; `param` names it
    │   ├── InvalidName         a task's or tenant's name breaks the rule
    │   └── InvalidConfig       adapter_config.json is wrong; `param` names the field
    ├── UnsupportedFile         not a sound safetensors file
    ├── FileTooLarge            more bytes than the store accepts
    ├── PromptMismatch          sound, but does not fit the backbone or its own configuration
    ├── TaskNotFound            unknown or foreign: the two are not told apart
    ├── KeyNotFound             no key has this id
    ├── TrainingNotFound        no such file or job of the tenant: unknown and foreign are not told apart
    ├── VersionConflict         a compare-and-swap was lost, or the name is retired
    ├── VersionActive           the active version, or the canary, cannot be deleted
    ├── GateNotPassed           the version's gate does not let it become active
    ├── QuotaExceeded           the tenant may not store more
    │   └── TooManyJobs         of its training jobs, too many have not ended
    ├── PromptCorrupt           stored bytes no longer have their digest
    ├── StoreInUse              another process holds the folder
    ├── StorageFull             no space or no quota left
    └── StorageFailed           any other input or output error
        └── StorageUnavailable  the database server cannot be reached; it may be back soon
"""

from typing import ClassVar


class PromptStoreError(Exception):
    """Base of everything the store raises on purpose.

    `code` is stable and meant for machines; `message` is one sentence for people; `param` names the offending
    argument or field (`file`, `config`, `config.num_layers`, `task`, ...) or is None.
    """

    code: ClassVar[str] = "prompt_store_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidValue(PromptStoreError):  # noqa: N818
    code = "invalid_value"


class InvalidName(InvalidValue):
    code = "invalid_name"


class InvalidConfig(InvalidValue):
    code = "invalid_config"


class UnsupportedFile(PromptStoreError):  # noqa: N818
    code = "unsupported_file"


class FileTooLarge(PromptStoreError):  # noqa: N818
    code = "file_too_large"


class PromptMismatch(PromptStoreError):  # noqa: N818
    """The message says which shape was found and which is needed."""

    code = "prompt_mismatch"


class TaskNotFound(PromptStoreError):  # noqa: N818
    code = "task_not_found"


class KeyNotFound(PromptStoreError):  # noqa: N818
    code = "key_not_found"


class TrainingNotFound(PromptStoreError):  # noqa: N818
    code = "training_not_found"


class VersionConflict(PromptStoreError):  # noqa: N818
    code = "version_conflict"


class VersionActive(PromptStoreError):  # noqa: N818
    code = "version_active"


class GateNotPassed(PromptStoreError):  # noqa: N818
    code = "gate_not_passed"


class QuotaExceeded(PromptStoreError):  # noqa: N818
    """`param` names the limit."""

    code = "quota_exceeded"


class TooManyJobs(QuotaExceeded):
    code = "too_many_jobs"


class PromptCorrupt(PromptStoreError):  # noqa: N818
    code = "prompt_corrupt"


class StoreInUse(PromptStoreError):  # noqa: N818
    code = "store_in_use"


class StorageFull(PromptStoreError):  # noqa: N818
    code = "storage_full"


class StorageFailed(PromptStoreError):  # noqa: N818
    code = "storage_failed"


class StorageUnavailable(StorageFailed):
    code = "storage_unavailable"
