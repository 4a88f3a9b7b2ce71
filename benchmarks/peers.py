"""What a user would write without promptmux: PEFT one request at a time, and a static batch by hand.

Both run the stock transformers model with its default attention, EOS ignored, greedy.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.workload import Workload


def load_stock_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.train(False)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class PeftOneAtATime:
    """`set_adapter`, then `generate`, for each request in turn; all adapters are loaded before the clock starts."""

    def __init__(self, folder: str, dtype: torch.dtype, workload: Workload) -> None:
        base = load_stock_model(folder, dtype)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(workload.prompts[0]))
        with tempfile.TemporaryDirectory() as scratch:
            get_peft_model(base, config).save_pretrained(scratch)
            file = Path(scratch) / "adapter_model.safetensors"
            self._model: PeftModel | None = None
            for i, prompt in enumerate(workload.prompts):
                save_file({"prompt_embeddings": torch.from_numpy(prompt.copy())}, file)
                if self._model is None:
                    stock = load_stock_model(folder, dtype)
                    self._model = PeftModel.from_pretrained(stock, scratch, adapter_name="task0")
                else:
                    self._model.load_adapter(scratch, adapter_name=f"task{i}")
        if self._model is None:
            raise ValueError("the workload has no prompts")
        self._model.train(False)

    @torch.inference_mode()
    def run(self, workload: Workload) -> list[list[int]]:
        """The new tokens of each request."""
        if self._model is None:
            raise RuntimeError("no adapter is loaded")
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
    """Batches of `size` requests in arrival order: left-padded embeddings, each row's prompt gathered by index."""

    def __init__(self, folder: str, dtype: torch.dtype, workload: Workload, size: int) -> None:
        self._model = load_stock_model(folder, dtype)
        self._size = size
        self._prompts = torch.stack([torch.from_numpy(p) for p in workload.prompts]).to(dtype)  # [prompts, k, hidden]

    @torch.inference_mode()
    def run(self, workload: Workload) -> list[list[int]]:
        """The new tokens of each request; a batch runs until its longest row is done."""
        answers: list[list[int]] = []
        for start in range(0, len(workload.requests), self._size):
            batch = workload.requests[start : start + self._size]
            k = self._prompts.shape[1]
            longest = max(len(request.token_ids) for request in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros((len(batch), k + longest), dtype=torch.long)
            for i, request in enumerate(batch):
                ids[i, longest - len(request.token_ids) :] = torch.tensor(request.token_ids)
                mask[i, longest - len(request.token_ids) :] = 1
            tokens = self._model.get_input_embeddings()(ids)
            rows = torch.zeros((len(batch), k + longest, tokens.shape[-1]), dtype=tokens.dtype)
            prompts = self._prompts[torch.tensor([request.prompt for request in batch])]
            for i, request in enumerate(batch):
                pad = longest - len(request.token_ids)
                rows[i, pad : pad + k] = prompts[i]
                rows[i, pad + k :] = tokens[i, pad:]
            most = max(request.num_new_tokens for request in batch)
            output = self._model.generate(
                inputs_embeds=rows, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False
            )
            answers.extend(output[i, : request.num_new_tokens].tolist() for i, request in enumerate(batch))
        return answers
