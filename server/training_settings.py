"""The settings of training on the server; `server.settings` has the others, and the rules for all of them."""

from pydantic import BaseModel, Field

from server.setting_types import GIB, KIB, MIB, Bytes, OnOff


class TrainingSettings(BaseModel):
    """Whether tenants may have prompts made here, how much of the engine that may take, and how much they may ask."""

    allow_training: OnOff = Field(
        "off",
        description="on: tenants may have prompts made on this server, by OpenAI's fine-tuning API.",
    )
    training_share: float = Field(
        0.2,
        ge=0,
        le=0.9,
        description="What training may take of the engine's time while sequences run; 0: it waits until none does.",
    )
    training_jobs_at_once: int = Field(
        4,
        ge=1,
        le=64,
        description="Training jobs that take turns, of all tenants together; the others wait.",
    )
    max_training_steps: int = Field(
        20_000,
        ge=1,
        le=1_000_000,
        description="Optimizer steps that one training job may ask for.",
    )
    max_training_tokens: int = Field(
        1024,
        ge=16,
        le=1_000_000,
        description="Tokens of the longest row that is trained on: virtual ones and an example, or a cartridge's text. "
        "What a job takes of the memory grows with it.",
    )
    max_training_parameters: int = Field(
        50_000_000,
        ge=1000,
        description="Numbers that one job may train, its encoder's included; each takes some 20 bytes meanwhile.",
    )
    max_training_file_bytes: Bytes = Field(
        16 * MIB,
        ge=KIB,
        le=256 * MIB,
        description="Largest file of examples; counted while it streams in.",
    )
    max_tenant_training_bytes: Bytes = Field(
        GIB,
        ge=KIB,
        description="Bytes of a tenant's files of examples together.",
    )
    max_tenant_training_jobs: int = Field(
        16,
        ge=1,
        le=10_000,
        description="Training jobs of a tenant that may be queued or running.",
    )
