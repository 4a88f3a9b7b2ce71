"""A row's text as it grows: bytes become text only when they cannot change any more.

Tokens are decoded in a window that begins a few tokens back, because a token's text may depend on its neighbours (the
method of TGI and vLLM). What ends in an incomplete UTF-8 sequence is held back, and so is what might be the beginning
of a stop string; a stop string itself is never delivered.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, **kwargs: Any) -> Any: ...

    def __hash__(self) -> int: ...


REPLACEMENT = "�"


class TextStream:
    """Turns one row's generated tokens into final text; `context` are the client's tokens before them."""

    WINDOW = 6
    MAX_PENDING_IDS = 8
    """No character spans more tokens: what is still incomplete then will never be complete."""

    def __init__(
        self, tokenizer: Tokenizer, *, context: Sequence[int], stop: Sequence[str], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max((len(s) for s in stop), default=0)
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(context[-self.WINDOW :])
        self._window = 0
        self._read = len(self._ids)
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token_id: int, *, check_stop: bool = True) -> str:
        """Add one generated token; returns the text that has become final, possibly none.

        When a stop string is complete, `stopped_by` names it and what came before it is returned.
        """
        self._ids.append(token_id)
        known = self._known()
        grown = self._decode(self._ids[self._window :])
        is_overdue = len(self._ids) - self._read > self.MAX_PENDING_IDS
        if len(grown) > len(known) and (is_overdue or not grown.endswith(REPLACEMENT)):
            self._held += grown[len(known) :]
            self._window, self._read = self._read, len(self._ids)
        return self._release(check_stop)

    def finish(self) -> str:
        """The text that was held back, when the row ends for another reason than a stop string."""
        known = self._known()
        rest = self._decode(self._ids[self._window :])[len(known) :]
        held, self._held = self._held + rest, ""
        return held

    def _known(self) -> str:
        """The window's text without what is still to be read. Mostly that of one token, which is looked up."""
        return _decode_few(self._tokenizer, tuple(self._ids[self._window : self._read]), self._skip_special_tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special_tokens)
        return text

    def _release(self, check_stop: bool) -> str:
        if check_stop and self._stop:
            found = [(at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                at, self.stopped_by = min(found)
                final, self._held = self._held[:at], ""
                return final
        keep = self._possible_stop_length()
        cut = len(self._held) - keep
        final, self._held = self._held[:cut], self._held[cut:]
        return final

    def _possible_stop_length(self) -> int:
        """How many of the last held characters may be the beginning of a stop string."""
        for length in range(min(len(self._held), self._longest_stop), 0, -1):
            tail = self._held[-length:]
            # A whole stop string here was completed while none was looked for: it is ordinary text.
            if any(len(s) > length and s.startswith(tail) for s in self._stop):
                return length
        return 0


@functools.lru_cache(maxsize=16384)
def _decode_few(tokenizer: Tokenizer, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    return text
