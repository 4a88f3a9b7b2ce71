"""transformers' own continuous batching, which serves no soft prompts: the stock model, paged, greedy, EOS ignored.

Owns giving it room for the whole workload and keeping it warm between runs. Refuses to know promptmux's engine.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.peers import load_stock_model
from server.bench.workload import Workload

_PAGE_SIZE = 256
_RESULT_TIMEOUT_S = 60.0


class ContinuousBatching:
    """Use as a context manager: its thread and its graphs live from round to round, as a server's would."""

    def __init__(
        self, folder: str, dtype: torch.dtype, device: torch.device, workload: Workload, *, max_step_tokens: int
    ) -> None:
        self._model: Any = load_stock_model(folder, dtype).to(device)  # type: ignore[arg-type]
        most = max(len(request.token_ids) + request.num_new_tokens for request in workload.requests)
        self._config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            # As much again as every request needs at once.
            num_blocks=2 * len(workload.requests) * -(-most // _PAGE_SIZE),
            max_batch_tokens=max_step_tokens,
            allow_block_sharing=False,
        )
        self._stack = ExitStack()
        self._manager: Any = None

    def __enter__(self) -> "ContinuousBatching":
        generation = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1
        )
        self._manager = self._stack.enter_context(
            self._model.continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=self._config, block=True, timeout=30
            )
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, workload: Workload) -> list[list[int]]:
        """The new tokens of each request. Raises RuntimeError when it gives none."""
        ids = [
            self._manager.add_request(list(request.token_ids), max_new_tokens=request.num_new_tokens)
            for request in workload.requests
        ]
        answers: dict[str, list[int]] = {}
        while len(answers) < len(ids):
            result = self._manager.get_result(timeout=_RESULT_TIMEOUT_S)
            if result is None or result.error is not None:
                reason = "nothing came" if result is None else result.error
                raise RuntimeError(f"transformers' continuous batching has failed: {reason}")
            if result.is_finished():
                answers[result.request_id] = result.generated_tokens
        return [answers[request_id] for request_id in ids]
