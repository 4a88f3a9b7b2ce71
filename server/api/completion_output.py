"""From a row's outputs to choices and log-probabilities, as OpenAI's legacy completions write them.

Plain dicts: nothing here runs Pydantic, because it runs once a token. One `ChoiceWriter` a row carries what a stream
must remember between chunks.
"""

from collections.abc import Sequence

from server.api.generation_response import Json, ResponseWriter, prompt_identity
from server.engine.request import RowOutput, TokenLogprob
from server.runtime.generation import GenerationItem
from server.runtime.in_flight import RunningGeneration
from server.runtime.tokens import OffsetCounter, TokenCodec


class ChoiceWriter:
    """Writes the choices of one row. With `echo` its first choice begins with the prompt."""

    def __init__(
        self, index: int, item: GenerationItem, codec: TokenCodec, *, echo: bool, names_task: bool, skips_special: bool
    ) -> None:
        self._index = index
        self._item = item
        self._codec = codec
        self._owes_echo = echo
        self._skips_special = skips_special
        self._offsets = OffsetCounter(codec, skip_special_tokens=skips_special)
        self._identity: Json = {}
        if names_task:
            self._identity = {"task": item.reference, "prompt": prompt_identity(item.prompt)}

    def write(self, output: RowOutput) -> Json:
        """The choice that carries `output`."""
        text = output.text
        ids: list[int] = []
        entries: list[TokenLogprob | None] = []
        if self._owes_echo:
            self._owes_echo = False
            text = self._echo_text() + text
            if output.prompt_logprobs is not None:
                ids.extend(self._item.token_ids)
                entries.extend(output.prompt_logprobs)
        ids.extend(entry.token_id for entry in output.logprobs)
        entries.extend(output.logprobs)
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(ids, entries) if entries else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            **self._identity,
        }

    def _echo_text(self) -> str:
        if self._item.text is not None:
            return self._item.text
        return self._codec.decode(self._item.token_ids, skip_special_tokens=self._skips_special)

    def _logprobs(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> Json:
        return {
            "tokens": [self._codec.text_of(token_id) for token_id in ids],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": [self._offsets.advance(token_id) for token_id in ids],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        if not entry.top:
            return {self._codec.text_of(entry.token_id): entry.logprob}
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            text = self._codec.text_of(token_id)
            # Two ids may read alike, such as halves of characters: the larger number stays.
            top[text] = max(logprob, top.get(text, logprob))
        return top


class CompletionWriter(ResponseWriter):
    """Writes the JSON of one completions request."""

    def __init__(
        self,
        running: RunningGeneration,
        codec: TokenCodec,
        *,
        model: str,
        system_fingerprint: str,
        echo: bool,
        names_tasks: bool,
    ) -> None:
        generation = running.generation
        super().__init__(
            running,
            id_prefix="cmpl",
            whole_object="text_completion",
            chunk_object="text_completion",
            model=model,
            system_fingerprint=system_fingerprint,
            prompt=None if names_tasks else generation.items[0].prompt,
        )
        self._choices = {
            row.row_id: ChoiceWriter(
                index,
                generation.items[index // generation.n],
                codec,
                echo=echo,
                names_task=names_tasks,
                skips_special=row.sampling.skip_special_tokens,
            )
            for index, row in enumerate(generation.rows)
        }

    def whole_choice(self, output: RowOutput) -> Json:
        return self._choices[output.row_id].write(output)

    def chunk_choices(self, outputs: Sequence[RowOutput]) -> list[Json]:
        choices = (self._choices[output.row_id].write(output) for output in outputs)
        # What is held back is nothing to show yet.
        return [c for c in choices if c["text"] or c["logprobs"] is not None or c["finish_reason"] is not None]
