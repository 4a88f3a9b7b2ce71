"""What a user would write without promptmux: PEFT one request at a time, and a static batch by hand.

Both run the stock transformers model with its default attention, EOS ignored, greedy. Owns making them as fast as a
user reasonably could; refuses to know promptmux's engine.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from server.bench.workload import BenchRequest, Workload


def load_stock_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers loads it, frozen, EOS ignored."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.train(False)
    model.requires_grad_(False)
    generation: Any = model.generation_config
    generation.eos_token_id = None
    generation.pad_token_id = 0
    return model


class PeftOneAtATime:
    """`set_adapter`, then `generate`, for each request in turn; all adapters are loaded before the clock starts."""

    def __init__(self, folder: str, dtype: torch.dtype, workload: Workload) -> None:
        """Raises ValueError when the workload has no prompts."""
        if not workload.prompts:
            raise ValueError("the workload has no prompts")
        model = load_stock_model(folder, dtype)
        self._model: Any
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(workload.prompts[0]))
        with tempfile.TemporaryDirectory() as scratch:
            get_peft_model(load_stock_model(folder, dtype), config).save_pretrained(scratch)
            file = Path(scratch) / "adapter_model.safetensors"
            save_file({"prompt_embeddings": torch.from_numpy(workload.prompts[0].copy())}, file)
            self._model = PeftModel.from_pretrained(model, scratch, adapter_name="task0")
            for i, prompt in enumerate(workload.prompts[1:], start=1):
                save_file({"prompt_embeddings": torch.from_numpy(prompt.copy())}, file)
                self._model.load_adapter(scratch, adapter_name=f"task{i}")
        self._model.train(False)

    @torch.inference_mode()
    def run(self, workload: Workload) -> list[list[int]]:
        """The new tokens of each request."""
        answers = []
        for request in workload.requests:
            self._model.set_adapter(f"task{request.prompt}")
            ids = torch.tensor([request.token_ids])
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.num_new_tokens,
                min_new_tokens=request.num_new_tokens,
                do_sample=False,
            )
            answers.append(output[0, -request.num_new_tokens :].tolist())
        return answers


class StaticBatch:
    """Batches of `size` requests by hand: left-padded embeddings, each row's prompt gathered by index, its own loop.

    What makes it the best of its kind: requests sorted by the length of their prompts, so that little is padded; keys
    and values written in place (transformers' dynamic cache copies all of them every step, its static one attends over
    all columns to the last); no `generate`, whose processors and criteria run every step; the LM head applied to the
    last token alone. What it cannot have, being static: a new row for one that has ended. `sort_by_new_tokens` sorts by
    the number of new tokens first, which a server cannot know: the bound that no static batch reaches.
    """

    def __init__(
        self, model: PreTrainedModel, workload: Workload, size: int, *, sort_by_new_tokens: bool = False
    ) -> None:
        """`model` is only read: many sizes may share it."""
        self._model = model
        self._size = size
        self._sort_by_new_tokens = sort_by_new_tokens
        self._prompts = torch.stack([torch.from_numpy(p) for p in workload.prompts]).to(model.dtype)

    @torch.inference_mode()
    def run(self, workload: Workload) -> list[list[int]]:
        """The new tokens of each request; a batch runs until its longest row is done."""
        order = sorted(range(len(workload.requests)), key=lambda i: self._rank(workload.requests[i]))
        answers: list[list[int]] = [[] for _ in workload.requests]
        for start in range(0, len(order), self._size):
            batch = order[start : start + self._size]
            tokens = self._run_batch([workload.requests[i] for i in batch])
            for i, row in zip(batch, tokens.tolist(), strict=True):
                answers[i] = row[: workload.requests[i].num_new_tokens]
        return answers

    def _rank(self, request: BenchRequest) -> tuple[int, int]:
        return (request.num_new_tokens if self._sort_by_new_tokens else 0, len(request.token_ids))

    def _run_batch(self, batch: list[BenchRequest]) -> torch.Tensor:
        """New tokens `[rows, most new tokens]`."""
        rows, mask = self._padded(batch)
        most = max(request.num_new_tokens for request in batch)
        mask = torch.cat([mask, mask.new_ones(len(batch), most)], dim=1)
        num_columns = rows.shape[1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = Cache(layers=[InPlaceLayer(mask.shape[1]) for _ in range(self._model.config.num_hidden_layers)])
        tokens = torch.empty((len(batch), most), dtype=torch.long)
        inputs: dict[str, torch.Tensor] = {"inputs_embeds": rows}
        done = 0
        for step in range(most):
            end = num_columns + step
            output = self._model(
                **inputs,
                attention_mask=mask[:, :end],
                position_ids=positions[:, done:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens[:, step] = output.logits[:, -1].argmax(dim=-1)
            inputs = {"input_ids": tokens[:, step : step + 1]}
            done = end
        return tokens

    def _padded(self, batch: list[BenchRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[rows, columns, hidden_size]` of prompt and tokens, to the right, and their mask."""
        k = self._prompts.shape[1]
        longest = max(len(request.token_ids) for request in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros((len(batch), k + longest), dtype=torch.long)
        for i, request in enumerate(batch):
            pad = longest - len(request.token_ids)
            ids[i, pad:] = torch.tensor(request.token_ids)
            mask[i, pad:] = 1
        tokens = self._model.get_input_embeddings()(ids)
        rows = torch.zeros((len(batch), k + longest, tokens.shape[-1]), dtype=tokens.dtype)
        prompts = self._prompts[torch.tensor([request.prompt for request in batch])]
        for i, request in enumerate(batch):
            pad = longest - len(request.token_ids)
            rows[i, pad : pad + k] = prompts[i]
            rows[i, pad + k :] = tokens[i, pad:]
        return rows, mask


class InPlaceLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, written in place into memory for `max_columns`; what is read is a view of it."""

    def __init__(self, max_columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._max_columns = max_columns
        self._num_columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rows, heads, _, dim = key_states.shape
        self._all_keys = key_states.new_empty((rows, heads, self._max_columns, dim))
        self._all_values = value_states.new_empty((rows, heads, self._max_columns, value_states.shape[-1]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self._num_columns = self._num_columns, self._num_columns + key_states.shape[-2]
        self._all_keys[:, :, first : self._num_columns] = key_states
        self._all_values[:, :, first : self._num_columns] = value_states
        self.keys = self._all_keys[:, :, : self._num_columns]
        self.values = self._all_values[:, :, : self._num_columns]
        return self.keys, self.values
