"""What a row should have been given: PEFT's own model, loaded back from the saved folder, one row alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from tests.factories import MadePrompt


class PeftOracle:
    """One `PeftModel` a prompt over one base model, which is not the engine's: PEFT cannot hold prompt tuning and
    prefix tuning in one model, and prompt learning does not change the base.

    Rows are run one at a time, because PEFT 0.21 answers left-padded batches under prompt tuning wrongly. A prompt None
    is the base model itself.
    """

    def __init__(self, base: PreTrainedModel, prompts: Iterable[MadePrompt]) -> None:
        self._base = base
        self._folders = {prompt.name: (prompt.folder, prompt.task_index) for prompt in prompts}
        self._models: dict[Path, Any] = {}

    @torch.no_grad()
    def logprobs(self, prompt: str | None, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities `[len(token_ids), vocab_size]` of what follows each token, by PEFT's own forward pass."""
        model, inputs = self._call(prompt, token_ids)
        # Prompts of embeddings lengthen the sequence, prefixes do not: the client's tokens are the last in both.
        logits: torch.Tensor = model(**inputs).logits[0, -len(token_ids) :]
        return logits.log_softmax(dim=-1)

    @torch.no_grad()
    def greedy(self, prompt: str | None, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that PEFT's own greedy `generate` adds, an end-of-sequence token included."""
        model, inputs = self._call(prompt, token_ids)
        generated: list[int] = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0].tolist()
        return generated[len(token_ids) :]

    def _call(self, prompt: str | None, token_ids: Sequence[int]) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.tensor([list(token_ids)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt is None:
            return self._base, inputs
        folder, task_index = self._folders[prompt]
        if task_index is not None:
            inputs["task_ids"] = torch.tensor([task_index])
        if folder not in self._models:
            self._models[folder] = peft.PeftModel.from_pretrained(self._base, str(folder)).eval()
        return self._models[folder], inputs
