"""P-tuning (Liu et al. 2021, "GPT understands, too"): the vectors are the output of a small trained encoder.

The encoder is PEFT's `PromptEncoder`, an MLP of three layers, and is discarded at export, as PEFT does.
"""

from typing import Any

import torch
from peft import PeftConfig, PromptEncoder, PromptEncoderConfig

from tuning.methods.base import BackboneFacts, VectorPrompt, common_fields
from tuning.methods.draw import drawn_from

_PromptEncoder: Any = PromptEncoder


class PTuning(VectorPrompt):
    """All weights of the encoder are drawn from `seed`; `encoder_hidden_size` None is the backbone's hidden size."""

    def __init__(
        self, backbone: BackboneFacts, num_virtual_tokens: int, *, encoder_hidden_size: int | None, seed: int
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self._fields = common_fields(backbone, num_virtual_tokens, deep=False)
        self._fields["encoder_hidden_size"] = encoder_hidden_size or backbone.hidden_size
        with drawn_from(seed):
            encoder = _PromptEncoder(PromptEncoderConfig(**self._fields | {"inference_mode": False}))
        self.encoder = encoder.to(backbone.device, torch.float32)
        self._indices = torch.arange(num_virtual_tokens, device=backbone.device)

    def forward(self) -> torch.Tensor:
        vectors: torch.Tensor = self.encoder(self._indices)
        return vectors

    def peft_config(self) -> PeftConfig:
        return PromptEncoderConfig(**self._fields)
