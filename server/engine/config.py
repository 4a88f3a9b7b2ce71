"""The engine's own settings: a frozen value, made once from the server's settings."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the step loop. Every number is positive; `kv_cache_bytes` None lets the engine take a share of memory.

    `keeps_texts` lets later rows of a tenant share the keys and values of the beginning that they have in common with
    an earlier one under the same prompt. `is_deterministic`: a row's bits do not depend on what shares the batch.
    `overlaps`: a step is launched before the one before it is looked at; None: where the backbone is on CUDA.
    `compiles` lets steps be compiled in the background. `background_share` is what other work may take of the engine's
    time while rows are served. `poison_freed_pages` fills freed memory with NaN, so that a row
    that reads what it does not own cannot go unnoticed; it is for tests, the check of owners and generations is always
    on.
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
    keeps_texts: bool = True
    is_deterministic: bool = False
    overlaps: bool | None = None
    compiles: bool = True
    background_share: float = 0.2
    poison_freed_pages: bool = False
