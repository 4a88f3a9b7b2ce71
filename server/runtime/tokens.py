"""Text to token ids and back, by the backbone's tokenizer.

Owns what a single token reads as in log-probabilities. Refuses to know requests. Virtual tokens have no id and never
come here.
"""

import re
from collections.abc import Sequence
from functools import cache

from server.runtime.protocols import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Of a text that is long for its limit, at first so many characters a token of the limit are looked at, about twice what
# texts have.
CHARS_PER_TOKEN = 8
# Tokens that a text's beginning may have more than the whole text has there: a word that was cut reads otherwise.
EDGE_TOKENS = 512
_MARGIN, _MAX_GROWTH = 1.25, 4
# How sentencepiece names the tokens that are one byte.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TooManyTokensError(Exception):
    """A text has more tokens than it may have: at least `at_least`."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class TokenCodec:
    """Encodes, decodes and names tokens. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.special_ids = frozenset(tokenizer.all_special_ids)
        # Bounded by the vocabulary.
        self._texts: dict[int, str] = {}
        self._takes_space_before = any(token.lstrip for token in tokenizer.added_tokens_decoder.values())

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`. Takes about a millisecond a kilobyte: long texts belong in a thread."""
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode_within(self, text: str, *, add_special_tokens: bool, max_tokens: int) -> tuple[int, ...]:
        """As `encode`, at a cost bounded by what could fit: of a text that is far too long, only a beginning is
        tokenised that is seen to be too long by itself.

        Raises TooManyTokensError for such a text; one that is too long by less is returned whole.
        """
        num_chars = max_tokens * CHARS_PER_TOKEN
        while num_chars < len(text):
            beginning = text[:num_chars]
            if self._takes_space_before:
                # However long it is, the white space at the end may be part of one token that comes next.
                beginning = beginning.rstrip()
            num_found = len(self.encode(beginning, add_special_tokens=False))
            if num_found - EDGE_TOKENS > max_tokens:
                raise TooManyTokensError(num_found - EDGE_TOKENS)
            # As far as it takes if the text goes on like this; not farther, for it may not.
            growth = _MARGIN * (max_tokens + EDGE_TOKENS) / max(num_found, 1)
            num_chars = int(num_chars * min(max(growth, 2), _MAX_GROWTH))
        return self.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def text_of(self, token_id: int) -> str:
        """What one token adds to a text, its leading space included; bytes of half a character read as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            # Tokenizers of the sentencepiece family drop the space of a text's first token, not of its second.
            alone, twice = self.decode([token_id]), self.decode([token_id, token_id])
            text = twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
            self._texts[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes in UTF-8, also where they are part of a character only."""
        text = self.text_of(token_id)
        if REPLACEMENT not in text:
            return text.encode("utf-8")
        name = self.names([token_id])[0]
        found = _BYTE_TOKEN.fullmatch(name)
        if found is not None:
            return bytes([int(found[1], 16)])
        alphabet = _byte_level_alphabet()
        if all(character in alphabet for character in name):
            return bytes(alphabet[character] for character in name)
        return text.encode("utf-8")

    def special_tokens(self) -> dict[str, str]:
        """The tokens that have a role, by its name: `bos_token`, `eos_token` and so on."""
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls these tokens."""
        return self._tokenizer.convert_ids_to_tokens(list(token_ids))


class OffsetCounter:
    """Counts where each token of one text begins, in characters, token by token.

    A character whose bytes are spread over several tokens begins where the first of them does. Special tokens take
    no room when they are skipped in the text.
    """

    # No character has more bytes; bytes that never become one must not be held for ever.
    _MAX_HELD = 4

    def __init__(self, codec: TokenCodec, *, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skips_special = skip_special_tokens
        self._offset = 0
        self._held: list[int] = []

    def advance(self, token_id: int) -> int:
        """The offset at which `token_id` begins; the counter moves past it."""
        start = self._offset
        if self._skips_special and token_id in self._codec.special_ids:
            return start
        text = self._codec.text_of(token_id)
        if not self._held and not text.endswith(REPLACEMENT):
            self._offset += len(text)
            return start
        self._held.append(token_id)
        held_text = self._codec.decode(self._held)
        if not held_text.endswith(REPLACEMENT) or len(self._held) >= self._MAX_HELD:
            self._offset += len(held_text)
            self._held.clear()
        return start


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies, as GPT-2 chose them: bytes that print stand
    for themselves, the others take the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
