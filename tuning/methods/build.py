"""Makes a task's prompt, started where its configuration says."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tuning.attention import KeysValues
from tuning.forward import PackedPass, embed
from tuning.methods.base import BackboneFacts, SoftPrompt, flatten_layers
from tuning.methods.beginnings import label_pieces, sample_common, text_ids
from tuning.methods.cartridge import Cartridge, Teacher
from tuning.methods.p_tuning import PTuning
from tuning.methods.p_tuning_v2 import PTuningV2
from tuning.methods.prefix_tuning import PrefixTuning
from tuning.methods.prompt_tuning import PromptTuning
from tuning.packing import PromptSlot, Row, pack
from tuning.records import TrainTask, TrainTaskError


class PromptBuilder:
    """Makes prompts for one backbone. `name` is the backbone's, for PEFT's configuration."""

    def __init__(self, packed: PackedPass, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> None:
        self._packed = packed
        self._tokenizer = tokenizer
        config = packed.model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.facts = BackboneFacts(
            # A folder of this machine means nothing on another.
            name=name or Path(packed.model.name_or_path or "").name or str(config.model_type),
            hidden_size=packed.hidden_size,
            num_attention_heads=int(config.num_attention_heads),
            layers=packed.layers,
            device=packed.device,
        )

    @torch.no_grad()
    def build(self, task: TrainTask) -> SoftPrompt:
        """The task's prompt before its first step. Raises TrainTaskError, UnsupportedBackboneError."""
        config, facts, k = task.config, self.facts, task.config.num_virtual_tokens
        width, seed = config.encoder_hidden_size, config.seed
        if config.method == "prompt_tuning":
            start = self._start_vectors(task)
            return PromptTuning(facts, k, init=config.usual_init, start=start, seed=seed)
        if config.method == "p_tuning":
            return PTuning(facts, k, encoder_hidden_size=width, seed=seed)
        if config.method == "prefix_tuning":
            return PrefixTuning(facts, k, encoder_hidden_size=width, seed=seed)
        facts.deep_layer()
        if config.method == "p_tuning_v2":
            return PTuningV2(facts, k, start=self._start_keys_values(task), seed=seed)
        return Cartridge(facts, k, start=self._start_keys_values(task), seed=seed)

    def check(self, task: TrainTask) -> None:
        """Whether the prompt can be built, without building it. Raises TrainTaskError, UnsupportedBackboneError."""
        if task.config.method in ("prefix_tuning", "p_tuning_v2", "cartridge"):
            self.facts.deep_layer()
        if task.config.method == "cartridge":
            self._whole_text(task)
        elif task.config.usual_init == "labels":
            label_pieces(task)
        elif task.config.usual_init == "text":
            text_ids(task, self._tokenizer)

    def num_text_tokens(self, task: TrainTask) -> int:
        """Tokens of the text that a cartridge is made of; 0 for any other method. Raises TrainTaskError."""
        return len(self._whole_text(task)) if task.config.method == "cartridge" else 0

    def teacher(self, task: TrainTask) -> Teacher | None:
        """What a cartridge is distilled from; None for any other method. Raises TrainTaskError."""
        if task.config.method != "cartridge":
            return None
        ids = self._whole_text(task)
        return Teacher(self._read(ids), len(ids))

    def _start_vectors(self, task: TrainTask) -> torch.Tensor | None:
        if task.config.usual_init == "random":
            return None
        if task.config.usual_init == "labels":
            pieces = label_pieces(task)
            return torch.stack([self._embed(piece).mean(dim=0) for piece in pieces])
        return self._embed(self._start_ids(task))

    def _start_keys_values(self, task: TrainTask) -> torch.Tensor | None:
        if task.config.usual_init == "random":
            return None
        ids = self._start_ids(task)
        return flatten_layers(self._read(ids), len(ids))

    def _start_ids(self, task: TrainTask) -> list[int]:
        """One token id for each virtual token."""
        count = task.config.num_virtual_tokens
        if task.config.usual_init == "vocab":
            return sample_common(self._tokenizer, self.vocab_size, count, task.config.seed)
        if task.config.usual_init == "labels":
            # Keys and values are of tokens in a text: the labels one after the other.
            return [token_id for piece in label_pieces(task) for token_id in piece][:count]
        ids = self._whole_text(task) if task.config.method == "cartridge" else text_ids(task, self._tokenizer)
        return ids[:count]

    def _whole_text(self, task: TrainTask) -> list[int]:
        if task.config.init_text is None:
            raise TrainTaskError("a cartridge is made of a text", task=task.name, field="init_text")
        ids: list[int] = list(self._tokenizer(task.config.init_text)["input_ids"])
        if len(ids) < task.config.num_virtual_tokens:
            raise TrainTaskError(
                f"has {len(ids)} tokens, fewer than the {task.config.num_virtual_tokens} virtual ones it is to be",
                task=task.name,
                field="init_text",
            )
        return ids

    def _embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        return embed(self._packed.model, torch.tensor(list(token_ids), device=self._packed.device)).float()

    def _read(self, token_ids: Sequence[int]) -> list[KeysValues]:
        """Every layer's keys and values of a text alone: `[kv_heads, n, dim]` each."""
        row = Row(0, tuple(token_ids), (0,))
        return self._packed.keys_values(pack([row], [PromptSlot(0, in_pass=False)], self._packed.device))
