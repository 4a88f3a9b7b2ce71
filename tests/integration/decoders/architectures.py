"""The architectures that are tried: a tiny random model of each, with what makes it differ kept.

A window is shorter than the rows, a soft cap is low enough to bend scores, every other layer is of the other kind. The
order is that of docs/architectures.md, which is made from this table and what was measured with it. The path is
declared here, so that no architecture falls from packed to dense unseen.
"""

from dataclasses import dataclass
from typing import Literal

from tests.factories import HIDDEN_SIZE, NUM_LAYERS
from tests.integration.decoders.ingredients import Config, Table
from tests.integration.decoders.packed import PACKED
from tests.integration.decoders.unpacked import DENSE, REFUSED

ServedBy = Literal["packed", "dense", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """`model_type` and `config` are transformers'; several architectures may share a type.

    `prompt_fields` (embeddings) and `prefix_fields` are what PEFT must be told to make prompts that fit, where it does
    not find out by itself.
    """

    name: str
    model_type: str
    config: Config
    path: ServedBy
    peculiar: str
    prompt_fields: Config
    prefix_fields: Config


_UNNAMED: Config = {"num_layers": NUM_LAYERS, "num_attention_heads": 4, "token_dim": HIDDEN_SIZE}

_PROMPT_FIELDS: dict[str, Config] = {
    # PEFT takes the width of the model for that of its embeddings.
    "opt (350m)": {"token_dim": HIDDEN_SIZE // 2},
    # PEFT does not know these configurations' names for their heads.
    "dbrx": _UNNAMED,
    "mpt": _UNNAMED,
    "xglm": _UNNAMED,
}

_PREFIX_FIELDS: dict[str, Config] = {
    "dbrx": _UNNAMED | {"num_attention_heads": 2, "token_dim": HIDDEN_SIZE // 2},
    "mpt": _UNNAMED,
    "xglm": _UNNAMED,
    # PEFT does not know falcon's name for its one shared head and would size a prefix for all query heads.
    "falcon": {"num_attention_heads": 1, "token_dim": HIDDEN_SIZE // 4},
}


def _tabulate(path: ServedBy, table: Table) -> list[Architecture]:
    return [
        Architecture(
            name=name,
            model_type=name.split(" ")[0],
            config=config,
            path=path,
            peculiar=peculiar,
            prompt_fields=_PROMPT_FIELDS.get(name, {}),
            prefix_fields=_PREFIX_FIELDS.get(name, {}),
        )
        for name, (peculiar, config) in table.items()
    ]


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (*_tabulate("packed", PACKED), *_tabulate("dense", DENSE), *_tabulate("refused", REFUSED))
}
