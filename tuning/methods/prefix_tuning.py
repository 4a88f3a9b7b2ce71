"""Prefix tuning (Li & Liang 2021): every layer's keys and values are the output of a small trained MLP.

The MLP is PEFT's `PrefixEncoder` with its projection. It steadies the training of many keys and values at once; at
export it is discarded, and the file holds what it gave.
"""

from typing import Any

import torch
from peft import PeftConfig, PrefixEncoder, PrefixTuningConfig

from tuning.methods.base import BackboneFacts, DeepPrompt, common_fields
from tuning.methods.draw import drawn_from

_PrefixEncoder: Any = PrefixEncoder


class PrefixTuning(DeepPrompt):
    """All weights are drawn from `seed`; `encoder_hidden_size` None is the width of one layer's keys."""

    def __init__(
        self, backbone: BackboneFacts, num_virtual_tokens: int, *, encoder_hidden_size: int | None, seed: int
    ) -> None:
        super().__init__(backbone)
        self.num_virtual_tokens = num_virtual_tokens
        self._fields = common_fields(backbone, num_virtual_tokens, deep=True)
        self._fields["prefix_projection"] = True
        self._fields["encoder_hidden_size"] = encoder_hidden_size or self._fields["token_dim"]
        with drawn_from(seed):
            encoder = _PrefixEncoder(PrefixTuningConfig(**self._fields | {"inference_mode": False}))
        self.encoder = encoder.to(backbone.device, torch.float32)
        self._indices = torch.arange(num_virtual_tokens, device=backbone.device)

    def forward(self) -> torch.Tensor:
        flat: torch.Tensor = self.encoder(self._indices)
        return flat

    def peft_config(self) -> PeftConfig:
        return PrefixTuningConfig(**self._fields)
