"""Cartridges (Eyuboglu et al. 2025): a long text distilled into the keys and values of k virtual tokens.

They start as the keys and values of the text's first tokens, the first of which stays as it is: many models rest their
attention on it. The trainer's loss is then how far the model with the cartridge is from the model that has read the
whole text, on the examples that it is given (`Teacher`).
"""

from dataclasses import dataclass

import torch
from peft import CartridgeConfig, PeftConfig
from torch import nn

from tuning.attention import KeysValues
from tuning.methods.base import BackboneFacts, DeepPrompt, common_fields


@dataclass(frozen=True, slots=True)
class Teacher:
    """The keys and values of the whole text, a layer each, in the backbone's dtype."""

    layers: list[KeysValues]
    num_tokens: int


class Cartridge(DeepPrompt):
    """`start [k, width]` is where keys and values begin; None draws them from a normal distribution, as PEFT does."""

    def __init__(
        self, backbone: BackboneFacts, num_virtual_tokens: int, *, start: torch.Tensor | None, seed: int
    ) -> None:
        super().__init__(backbone)
        self.num_virtual_tokens = num_virtual_tokens
        self._backbone = backbone
        self._num_frozen = min(1, num_virtual_tokens - 1)
        if start is None:
            start = torch.randn(num_virtual_tokens, self.width, generator=torch.Generator().manual_seed(seed))
        start = start.detach().to(backbone.device, torch.float32, copy=True)
        self.frozen_embedding: torch.Tensor
        self.register_buffer("frozen_embedding", start[: self._num_frozen].clone())
        self.trainable_embedding = nn.Parameter(start[self._num_frozen :].clone())

    def forward(self) -> torch.Tensor:
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def peft_config(self) -> PeftConfig:
        fields = common_fields(self._backbone, self.num_virtual_tokens, deep=True)
        return CartridgeConfig(num_frozen_tokens=self._num_frozen, **fields)
