"""Prompt tuning (Lester et al. 2021): k vectors in front of the input embeddings, trained as they are."""

import torch
from peft import PeftConfig, PromptTuningConfig, PromptTuningInit
from torch import nn

from tuning.config import Init
from tuning.methods.base import BackboneFacts, VectorPrompt, common_fields

RANDOM_RANGE = 0.5
"""Random vectors are drawn uniformly from minus this to this, as in the paper."""


class PromptTuning(VectorPrompt):
    """`start [k, d]` is where the vectors begin; None draws them."""

    def __init__(
        self, backbone: BackboneFacts, num_virtual_tokens: int, *, init: Init, start: torch.Tensor | None, seed: int
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self._backbone = backbone
        self._init = init
        if start is None:
            generator = torch.Generator().manual_seed(seed)
            start = torch.rand(num_virtual_tokens, backbone.hidden_size, generator=generator)
            start = start.mul_(2 * RANDOM_RANGE).sub_(RANDOM_RANGE)
        self.embedding = nn.Parameter(start.detach().to(backbone.device, torch.float32, copy=True))

    def forward(self) -> torch.Tensor:
        return self.embedding

    def peft_config(self) -> PeftConfig:
        # PEFT's names for beginnings: it knows no labels, and a text would need the tokenizer's place.
        kind = PromptTuningInit.SAMPLE_VOCAB if self._init == "vocab" else PromptTuningInit.RANDOM
        fields = common_fields(self._backbone, self.num_virtual_tokens, deep=False)
        return PromptTuningConfig(prompt_tuning_init=kind, **fields)
