"""From a row's outputs to messages, deltas and log-probabilities, as OpenAI's chat completions write them."""

from collections.abc import Sequence

from server.api.generation_response import Json, ResponseWriter
from server.engine.request import RowOutput, TokenLogprob
from server.runtime.in_flight import RunningGeneration
from server.runtime.tokens import TokenCodec

_ROLE = "assistant"


class ChatWriter(ResponseWriter):
    """Writes the JSON of one chat request. A stream begins with a chunk a choice that names the role."""

    def __init__(
        self, running: RunningGeneration, codec: TokenCodec, *, model: str, system_fingerprint: str, num_top: int
    ) -> None:
        generation = running.generation
        super().__init__(
            running,
            id_prefix="chatcmpl",
            whole_object="chat.completion",
            chunk_object="chat.completion.chunk",
            model=model,
            system_fingerprint=system_fingerprint,
            prompt=generation.items[0].prompt,
        )
        self._codec = codec
        self._num_top = num_top
        self._index = {row.row_id: index for index, row in enumerate(generation.rows)}
        self._owes_roles = True

    def whole_choice(self, output: RowOutput) -> Json:
        return {
            "index": self._index[output.row_id],
            "message": {"role": _ROLE, "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def chunk_choices(self, outputs: Sequence[RowOutput]) -> list[Json]:
        choices: list[Json] = []
        if self._owes_roles:
            self._owes_roles = False
            choices.extend(self._chunk_choice(index, {"role": _ROLE, "content": ""}) for index in self._index.values())
        for output in outputs:
            # What is held back is nothing to show yet.
            if output.text or output.logprobs or output.finish_reason is not None:
                delta = {"content": output.text} if output.text else {}
                choices.append(self._chunk_choice(self._index[output.row_id], delta, output))
        return choices

    def _chunk_choice(self, index: int, delta: Json, output: RowOutput | None = None) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(output.logprobs) if output is not None else None,
            "finish_reason": output.finish_reason if output is not None else None,
            "stop_reason": output.stop_reason if output is not None else None,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        if not entries:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    # The chosen token comes last where it is not among the likeliest.
                    "top_logprobs": [self._token(*alternative) for alternative in entry.top[: self._num_top]],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._codec.text_of(token_id),
            "logprob": logprob,
            "bytes": list(self._codec.bytes_of(token_id)),
        }
