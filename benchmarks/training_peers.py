"""How a user trains without promptmux: PEFT's usual loop, one task after the other, LoRA, and full fine-tuning.

transformers' own forward over a batch padded on the right, its loss over `labels`, AdamW, warm-up and linear decay,
gradient clipping: what PEFT's examples and transformers' Trainer do. Owns making it as fast as a user would (frozen
weights without gradients, one model for all tasks); refuses to know promptmux's trainer and what is measured.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuning.examples import EncodedExample
from tuning.methods import SoftPrompt
from tuning.methods.prefix_tuning import PrefixTuning

IGNORED = -100


def load_model(folder: str, dtype: torch.dtype, *, frozen: bool) -> PreTrainedModel:
    """The model as transformers loads it, in eval mode (no dropout), on the GPU where there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.train(False)
    model.requires_grad_(not frozen)
    loaded: PreTrainedModel = model.to("cuda" if torch.cuda.is_available() else "cpu")
    # Weights are mapped from their file: what is not read before is read, and counted, while something is measured.
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.sum()
    return loaded


def attach_lora(model: PreTrainedModel, *, rank: int, seed: int) -> PeftModel:
    """LoRA as PEFT sets it up by default (queries and values, alpha = 2 × rank), its weights in fp32."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted.eval()


class UsualLoop:
    """One model in training; each call of `step` is one optimizer step over one batch."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        learning_rate: float,
        num_steps: int,
        num_warmup_steps: int,
        max_grad_norm: float = 1.0,
        pad_token_id: int = 0,
        checkpointing: bool = False,
        autocast: bool = False,
    ) -> None:
        """What requires a gradient in `model` is trained. `autocast`: bf16 products over fp32 weights."""
        self._model: Any = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        factor = warm_up_then_decay(num_warmup_steps, num_steps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        self._max_grad_norm = max_grad_norm
        self._pad_token_id = pad_token_id
        self._autocast = autocast
        self._device = next(model.parameters()).device
        if checkpointing:
            # transformers checkpoints in training mode alone. Its dropout is off here: these models have none.
            self._model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            self._model.enable_input_require_grads()
            self._model.train()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, batch: Sequence[EncodedExample]) -> float:
        """Train on a batch; its loss before the update, in nats a completion token."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def validation_loss(self, examples: Sequence[EncodedExample], batch_size: int) -> float:
        """Mean over all completion tokens of the examples."""
        total, count = 0.0, 0
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            num_tokens = sum(len(example.completion_ids) for example in batch)
            total += float(self._loss(batch)) * num_tokens
            count += num_tokens
        return total / count

    def _loss(self, batch: Sequence[EncodedExample]) -> torch.Tensor:
        inputs = pad_batch(batch, self._pad_token_id, self._device)
        with torch.autocast(self._device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            loss: torch.Tensor = self._model(**inputs).loss
        return loss


def pad_batch(
    batch: Sequence[EncodedExample], pad_token_id: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each `[rows, longest]`, padded on the right.

    On the right, since PEFT ignores positions and answers batches wrongly that are padded on the left.
    """
    longest = max(example.num_tokens for example in batch)
    input_ids = torch.full((len(batch), longest), pad_token_id)
    labels = torch.full((len(batch), longest), IGNORED)
    attention_mask = torch.zeros((len(batch), longest), dtype=torch.long)
    for row, example in enumerate(batch):
        first, end = len(example.prompt_ids), example.num_tokens
        input_ids[row, :end] = torch.tensor([*example.prompt_ids, *example.completion_ids])
        labels[row, first:end] = torch.tensor(example.completion_ids)
        attention_mask[row, :end] = 1
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def warm_up_then_decay(num_warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """transformers' linear schedule: what a step multiplies the learning rate with."""

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup_steps))

    return factor


def attach_prompt(model: PreTrainedModel, prompt: SoftPrompt) -> PeftModel:
    """PEFT's own module of a prompt that was just built, with the same numbers in it, ready to be trained."""
    config: Any = prompt.peft_config()
    config.inference_mode = False
    # PEFT warns of another name than its own.
    config.base_model_name_or_path = model.name_or_path
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    encoder: Any = adapted.prompt_encoder[adapted.active_adapter]
    with torch.no_grad():
        if isinstance(prompt, PrefixTuning):
            encoder.load_state_dict(prompt.encoder.state_dict())
        else:
            encoder.embedding.weight.copy_(prompt())
    return adapted.eval()
