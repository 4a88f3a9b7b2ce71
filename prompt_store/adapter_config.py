"""Reads `adapter_config.json` as PEFT writes it, keeping only what decides how a prompt file is read.

Unknown fields are allowed: every PEFT release adds some, and none of them changes the saved tensors. What would change
the answer (extra trained modules, an encoder-decoder prompt, another kind of adapter) is refused by name.
"""

from dataclasses import dataclass
from typing import Any

from prompt_store.errors import InvalidConfig
from prompt_store.manifest import PromptKind
from prompt_store.names import shorten
from prompt_store.strict_json import StrictJsonError, parse_object

MULTITASK = "MULTITASK_PROMPT_TUNING"

# P-Tuning v2 is PREFIX_TUNING without projection, and has no name of its own in PEFT.
KIND_OF_PEFT_TYPE: dict[str, PromptKind] = {
    "PROMPT_TUNING": "embeddings",
    "P_TUNING": "embeddings",
    "CPT": "embeddings",
    MULTITASK: "embeddings",
    "PREFIX_TUNING": "prefix",
    "CARTRIDGE": "prefix",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of the file that are checked against tensors and backbone. None where the file does not say."""

    peft_type: str
    num_virtual_tokens: int | None
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    num_tasks: int | None
    num_ranks: int | None
    base_model: str | None

    @property
    def kind(self) -> PromptKind:
        return KIND_OF_PEFT_TYPE[self.peft_type]


def read_config(data: bytes) -> AdapterConfig:
    """Parse and check the file's bytes, whose number the caller bounds. Raises InvalidConfig naming the field."""
    try:
        fields = parse_object(data)
    except StrictJsonError as error:
        raise InvalidConfig(f"adapter_config.json {error}.", param="config") from error
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KIND_OF_PEFT_TYPE:
        raise _invalid("peft_type", peft_type, f"must be one of {', '.join(KIND_OF_PEFT_TYPE)}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise _invalid("task_type", fields["task_type"], "must be CAUSAL_LM: the backbone is a decoder")
    submodules = fields.get("num_transformer_submodules")
    if submodules is not None and not (type(submodules) is int and submodules == 1):
        raise _invalid("num_transformer_submodules", submodules, "must be 1 or null: the backbone is a decoder")
    if fields.get("modules_to_save") not in (None, []):
        raise _invalid("modules_to_save", fields["modules_to_save"], "must be empty: only the prompt itself is served")
    base_model = fields.get("base_model_name_or_path")
    if base_model is not None and not isinstance(base_model, str):
        raise _invalid("base_model_name_or_path", base_model, "must be a string or null")
    return AdapterConfig(
        peft_type=peft_type,
        num_virtual_tokens=_positive(fields, "num_virtual_tokens"),
        token_dim=_positive(fields, "token_dim"),
        num_layers=_positive(fields, "num_layers"),
        num_attention_heads=_positive(fields, "num_attention_heads"),
        num_tasks=_positive(fields, "num_tasks"),
        num_ranks=_positive(fields, "num_ranks"),
        base_model=base_model,
    )


def _positive(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 2**31:
        raise _invalid(name, value, "must be a positive whole number or null")
    return value


def _invalid(name: str, value: Any, rule: str) -> InvalidConfig:
    found = "missing" if value is None else shorten(repr(value), 60)
    return InvalidConfig(f"adapter_config.json: {name} is {found}; it {rule}.", param=f"config.{name}")
