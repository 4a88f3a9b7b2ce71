"""Tunes one soft prompt with PEFT over a frozen backbone, and saves it as PEFT does.

Owns the training loop of Lester et al. 2021 (prompt tuning) and Li & Liang 2021 (prefix tuning) at demo size. Refuses
to know tasks' data sources, figures and folders' layout; see `tuning.tasks`, `tuning.evaluate` and `tuning.demo`.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tuning.data import Dataset, Example, TaskSpec, worked_examples

IGNORED = -100

# Token ids of an item's prompt and of its completion.
Encoded = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast; the learning rate and the number of steps come from the task unless set here."""

    batch_size: int = 16
    num_steps: int | None = None
    learning_rate: float | None = None
    num_warmup_steps: int = 10
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """One training step, for a progress bar: loss in nats a token, before the step's update."""

    step: int
    num_steps: int
    loss: float
    num_examples: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A tuned prompt, still inside PEFT. `losses` has one entry a step."""

    model: PeftModel
    losses: tuple[float, ...]
    num_steps: int
    learning_rate: float
    seconds: float


def load_backbone(folder: Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a backbone folder frozen and in eval mode; bf16 where this CPU has the instructions, else fp32."""
    if dtype is None:
        has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if has_bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    backbone.requires_grad_(False)
    backbone.eval()
    return backbone.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def train_prompt(
    spec: TaskSpec,
    dataset: Dataset,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: TrainConfig,
    base_model_name: str,
    report: Callable[[StepReport], None] | None = None,
) -> TrainResult:
    """Tune the task's prompt on `dataset.train`.

    The prompt is kept in fp32 whatever the backbone's dtype. The loss covers the completion and the end-of-sequence
    token alone. `report` is called after each step. The backbone is left as it was, apart from PEFT holding it.
    """
    torch.manual_seed(config.seed)
    rng = random.Random(f"{config.seed}:{spec.name}:batches")  # noqa: S311 - reproducible order, not a secret
    model = attach_prompt(spec, dataset, backbone, tokenizer, base_model_name=base_model_name, rng=rng)
    num_steps = config.num_steps or spec.num_steps
    learning_rate = config.learning_rate or spec.learning_rate
    parameters = [p for p in model.parameters() if p.requires_grad]
    # No weight decay: it would pull keys and values towards zero, which is no natural place for them.
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_decay(config.num_warmup_steps, num_steps))
    encoded = [_encode(spec, example, tokenizer) for example in dataset.train]
    batches = _endless_batches(encoded, config.batch_size, rng)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(num_steps):
        batch = next(batches)
        loss = completion_loss(model, batch, pad_token_id=_pad_token_id(tokenizer))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if report is not None:
            report(StepReport(step=step, num_steps=num_steps, loss=losses[-1], num_examples=len(batch)))
    model.eval()
    return TrainResult(
        model=model,
        losses=tuple(losses),
        num_steps=num_steps,
        learning_rate=learning_rate,
        seconds=time.monotonic() - started,
    )


def attach_prompt(
    spec: TaskSpec,
    dataset: Dataset,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_model_name: str,
    rng: random.Random,
) -> PeftModel:
    """Wrap the backbone with a fresh prompt of the task's method, k and initialisation."""
    peft_config: PromptLearningConfig
    if spec.method == "prompt_tuning":
        start = PromptTuningInit.SAMPLE_VOCAB if spec.init == "vocab" else PromptTuningInit.RANDOM
        peft_config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=spec.k, prompt_tuning_init=start
        )
    else:
        peft_config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=spec.k)
    model = get_peft_model(backbone, peft_config)
    # PEFT fills in the backbone's local folder, which means nothing on another machine.
    peft_config.base_model_name_or_path = base_model_name
    if spec.init == "text":
        _start_from_text(model, spec, dataset, tokenizer, rng)
    elif spec.method == "prefix_tuning":
        raise ValueError(f"{spec.name}: init 'vocab' is for prompt_tuning; prefix_tuning starts from 'text'")
    return model


def completion_loss(model: torch.nn.Module, batch: Sequence[Encoded], *, pad_token_id: int) -> torch.Tensor:
    """Mean cross-entropy over the completions of `batch`, a fp32 scalar.

    Rows are padded on the right, where PEFT's missing position ids do no harm.
    """
    device = next(model.parameters()).device
    length = max(len(prompt) + len(completion) for prompt, completion in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    labels = torch.full((len(batch), length), IGNORED)
    attention_mask = torch.zeros((len(batch), length), dtype=torch.long)
    for row, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        labels[row, len(prompt) : end] = torch.tensor(completion)
        attention_mask[row, :end] = 1
    logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
    # Prompt tuning returns logits of the virtual tokens too; the client's are the last `length`.
    predictions = logits[:, -length:-1]
    wanted = labels[:, 1:].to(device)
    chosen = wanted != IGNORED
    return torch.nn.functional.cross_entropy(predictions[chosen].float(), wanted[chosen])


def save_prompt(model: PeftModel, folder: Path, *, dtype: torch.dtype) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, the tensor cast to `dtype`.

    Raises ValueError when the cast is not finite; nothing is written then.
    """
    # Told not to look for embedding layers to save: PEFT would ask the hub about the base model.
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in saved.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite as {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors lets the owner alone read; a server often runs as somebody else.
    path.chmod(0o644)
    config: Any = model.peft_config[model.active_adapter]
    was_inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = was_inference_mode


def _start_from_text(
    model: PeftModel,
    spec: TaskSpec,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> None:
    # Each item yields at least two tokens, so k items always fill k virtual tokens.
    chosen = rng.sample(dataset.train, min(spec.k, len(dataset.train)))
    token_ids = tokenizer(worked_examples(spec, chosen))["input_ids"]
    if len(token_ids) < spec.k:
        raise ValueError(f"{spec.name}: k={spec.k} is more than the {len(token_ids)} tokens of the training items")
    ids = torch.tensor([token_ids[: spec.k]], device=model.device)
    backbone: Any = model.get_base_model()
    encoder: Any = model.prompt_encoder[model.active_adapter]
    with torch.no_grad():
        if spec.method == "prompt_tuning":
            vectors = backbone.get_input_embeddings()(ids)[0].float()
            encoder.embedding.weight.copy_(vectors)
        else:
            cache = backbone(input_ids=ids, use_cache=True).past_key_values
            pairs = tuple((layer.keys.float(), layer.values.float()) for layer in cache.layers)
            initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs)


def _encode(spec: TaskSpec, example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    # Prompt and completion are tokenised apart: the server sees the prompt alone and then makes tokens one by one.
    prompt = tokenizer(spec.prompt_text(example))["input_ids"]
    completion = tokenizer(spec.completion_text(example), add_special_tokens=False)["input_ids"]
    return tuple(prompt), (*completion, _eos_token_id(tokenizer))


def _eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the backbone's tokenizer has no end-of-sequence token, so no answer could end")
    return tokenizer.eos_token_id


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked, so any id does where the tokenizer names none.
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else _eos_token_id(tokenizer)


def _endless_batches(items: Sequence[Encoded], batch_size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    queue: list[Encoded] = []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(items, len(items))
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _warm_up_then_decay(num_warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup_steps))

    return factor
