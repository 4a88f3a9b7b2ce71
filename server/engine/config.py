"""The engine's own settings: a frozen value, made once from the server's settings."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the step loop. Every number is positive; `kv_cache_bytes` None lets the engine take a share of memory.

    `poison_freed_slots` fills freed memory with NaN, so that a row that reads what it does not own cannot go
    unnoticed; it is for tests, the check of owners and generations is always on.
    """

    max_rows: int = 64
    max_step_tokens: int = 512
    prefill_chunk: int = 256
    max_waiting_rows: int = 1024
    kv_cache_bytes: int | None = None
    prefix_cache_bytes: int = 1 << 30
    host_prompt_bytes: int = 256 << 20
    max_virtual_tokens: int = 512
    audit_share: float = 0.01
    poison_freed_slots: bool = False
