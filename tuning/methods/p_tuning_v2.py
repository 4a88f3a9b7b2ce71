"""P-Tuning v2 (Liu et al. 2022): every layer's keys and values, trained as they are, without reparametrisation.

Its file is one of prefix tuning without projection. It may start from real keys and values, which Li & Liang (2021,
section 7.4) found to matter where there is little data.
"""

import torch
from peft import PeftConfig, PrefixTuningConfig
from torch import nn

from tuning.methods.base import BackboneFacts, DeepPrompt, common_fields


class PTuningV2(DeepPrompt):
    """`start [k, width]` is where keys and values begin; None draws them from a normal distribution, as the paper's
    code and PEFT do.
    """

    def __init__(
        self, backbone: BackboneFacts, num_virtual_tokens: int, *, start: torch.Tensor | None, seed: int
    ) -> None:
        super().__init__(backbone)
        self.num_virtual_tokens = num_virtual_tokens
        self._backbone = backbone
        if start is None:
            start = torch.randn(num_virtual_tokens, self.width, generator=torch.Generator().manual_seed(seed))
        self.embedding = nn.Parameter(start.detach().to(backbone.device, torch.float32, copy=True))

    def forward(self) -> torch.Tensor:
        return self.embedding

    def peft_config(self) -> PeftConfig:
        fields = common_fields(self._backbone, self.num_virtual_tokens, deep=True)
        # Of no use without an encoder, but PEFT fills it in.
        return PrefixTuningConfig(encoder_hidden_size=fields["token_dim"], **fields)
