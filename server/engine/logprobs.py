"""Log-probabilities of chosen tokens and of the likeliest others: computed on the device, read on the host later.

They are those of the backbone itself, before bias, penalties and temperature, as the scoring harnesses expect.
"""

from collections.abc import Sequence

import numpy as np
import torch

from server.engine.request import TokenLogprob
from server.engine.transfers import Download, upload

LOWEST_LOGPROB = -9999.0
"""Reported in place of minus infinity, which JSON cannot carry (vLLM's convention)."""


class DeviceLogprobs:
    """Asked for when made, on their way to the host from then on. Making them waits for nothing."""

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: Sequence[int | None]) -> None:
        """`logits [n, vocab_size]` of any float dtype, `token_ids [n]` on the same device.

        Row i gets the log-probability of `token_ids[i]` and its `num_alternatives[i]` best alternatives; None: nothing.
        """
        self._num_alternatives = num_alternatives
        self._wanted = [i for i, num in enumerate(num_alternatives) if num is not None]
        self._download: Download | None = None
        if not self._wanted:
            return
        if len(self._wanted) < len(num_alternatives):
            (index,) = upload([np.array(self._wanted, dtype=np.int64)], logits.device)
            logits, token_ids = logits[index], token_ids[index]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        ids = token_ids[:, None]
        values = logprobs.gather(1, ids)
        most = min(max(num_alternatives[i] or 0 for i in self._wanted), logprobs.shape[1])
        if most:
            top_values, top_ids = logprobs.topk(most, dim=-1)
            ids, values = torch.cat([ids, top_ids], dim=1), torch.cat([values, top_values], dim=1)
        self._download = Download([ids, values])

    def to_host(self) -> list[TokenLogprob | None]:
        """One entry a row. The chosen token is always among `top` when alternatives are asked for, with the same float.

        Waits for the device.
        """
        result: list[TokenLogprob | None] = [None] * len(self._num_alternatives)
        if self._download is None:
            return result
        ids, values = (tensor.tolist() for tensor in self._download.wait())
        for i, (token_id, *top_ids), (value, *top_values) in zip(self._wanted, ids, values, strict=True):
            count = self._num_alternatives[i] or 0
            top = [(token, _clamp(v)) for token, v in zip(top_ids[:count], top_values[:count], strict=True)]
            if count and token_id not in top_ids[:count]:
                top.append((token_id, _clamp(value)))
            result[i] = TokenLogprob(token_id, _clamp(value), tuple(top))
        return result


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_alternatives: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """What `DeviceLogprobs` says of tokens that the host knows. Waits for the device."""
    (ids,) = upload([np.asarray(token_ids, dtype=np.int64)], logits.device)
    return DeviceLogprobs(logits, ids, num_alternatives).to_host()


def _clamp(value: float) -> float:
    return max(value, LOWEST_LOGPROB)
