"""Text as it grows, compared with one decoding of everything and one search for the stop strings."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.text import REPLACEMENT, TextStream

ODD_TOKENS = [
    # Characters of several bytes that begin, end and lie across tokens: 🎉 is f0 9f 8e 89, 日 e6 97 a5, 本 e6 9c ac.
    b"a\xf0\x9f", b"\xf0\x9f\x8e", b"\x8e\x89", b"\x89b", b"\x97\xa5\xe6\x9c", b" \xe6\x9c\xac",
    b"ab", b"ba", b"aba", b" stop", b"st", b"op", REPLACEMENT.encode(),
]  # fmt: skip
EOS = 256 + len(ODD_TOKENS)


def byte_characters() -> list[str]:
    """The character by which byte-level tokenizers (GPT-2's and its heirs') write each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_byte_level() -> PreTrainedTokenizerFast:
    written = byte_characters()
    pieces = [bytes([byte]) for byte in range(256)] + ODD_TOKENS
    vocabulary = {"".join(written[byte] for byte in piece): index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<eos>": EOS}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: decoding drops the space of the first token, whichever that is."""
    vocabulary = {"<unk>": 0, "▁Paris": 1, "▁is": 2, "s": 3, "▁": 4, "▁a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_LEVEL = make_byte_level()
METASPACE = make_metaspace()


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def make_stream(
    *, context: Sequence[int] = (), stop: Sequence[str] = (), skip: bool = True, tokenizer: PreTrainedTokenizerFast
) -> TextStream:
    return TextStream(tokenizer, context=context, stop=stop, skip_special_tokens=skip)


def stable_texts(ids: Sequence[int]) -> list[str]:
    """After each token: what of the text cannot change any more."""
    texts, stable = [], ""
    for n in range(1, len(ids) + 1):
        text: Any = BYTE_LEVEL.decode(list(ids[:n]), skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):
            stable = text
        texts.append(stable)
    return texts


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.index(s), s) for s in stop if s in text]
    return min(found) if found else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    lengths = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(lengths, default=0)


any_ids = st.lists(
    st.one_of(st.integers(256, EOS), st.integers(0, 255), st.sampled_from(b"ab stop\xf0\x9f\x8e\x89")), max_size=24
)
texts = st.text(st.sampled_from("ab stop日本🎉é\n"), max_size=16)
stops = st.lists(st.text(st.sampled_from("ab stop日"), min_size=1, max_size=4), max_size=3).map(tuple)


@given(any_ids, texts, st.booleans())
@settings(deadline=None, max_examples=150)
def test_pieces_make_up_the_whole_text(ids: list[int], context: str, skip: bool) -> None:
    stream = make_stream(context=ids_of(context), skip=skip, tokenizer=BYTE_LEVEL)
    pieces = [stream.add(token_id) for token_id in ids]

    assert "".join(pieces) + stream.finish() == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(texts, texts)
@settings(deadline=None, max_examples=100)
def test_every_character_comes_with_its_last_byte_and_never_in_halves(text: str, context: str) -> None:
    stream = make_stream(context=ids_of(context), tokenizer=BYTE_LEVEL)
    pieces = [stream.add(token_id) for token_id in ids_of(text)]

    expected = [part for character in text for part in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == expected
    assert stream.finish() == ""


@given(any_ids, stops)
@settings(deadline=None, max_examples=200)
def test_stop_string_ends_the_text_before_it_wherever_the_tokens_are_cut(ids: list[int], stop: tuple[str, ...]) -> None:
    stream = make_stream(stop=stop, tokenizer=BYTE_LEVEL)
    delivered = ""
    for token_id, text in zip(ids, stable_texts(ids), strict=True):
        delivered += stream.add(token_id)
        found = first_stop(text, stop)
        if found is not None:
            at, stopped_by = found
            assert stream.stopped_by == stopped_by
            assert delivered == text[:at]
            return
        assert stream.stopped_by is None
        assert delivered == text[: len(text) - held_back(text, stop)]
    assert delivered + stream.finish() == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@given(any_ids, st.text(st.sampled_from("ab stop"), min_size=1, max_size=4), st.integers(0, 10))
@settings(deadline=None, max_examples=150)
def test_stop_string_that_is_complete_before_stopping_is_allowed_is_ordinary_text(
    ids: list[int], stop: str, num_unchecked: int
) -> None:
    stream = make_stream(stop=[stop], tokenizer=BYTE_LEVEL)
    delivered, before = "", 0
    for i, (token_id, text) in enumerate(zip(ids, stable_texts(ids), strict=True)):
        is_checked = i >= num_unchecked
        delivered += stream.add(token_id, check_stop=is_checked)
        if not is_checked:
            before = len(text)
            assert stream.stopped_by is None
            continue
        # An occurrence counts when it ends in what came after.
        at = text.find(stop, max(0, before - len(stop) + 1))
        assert (stream.stopped_by == stop) == (at >= 0)
        if at >= 0:
            assert delivered == text[:at]
            return
    assert delivered + stream.finish() == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("stop", "expected", "stopped_by"),
    [
        (("op",), "non st", "op"),
        (("op", "stop"), "non ", "stop"),
        ((" stop", "n"), "", "n"),
        (("stop", "sto"), "non ", "sto"),
        (("STOP",), "non stop", None),
    ],
)
def test_earliest_stop_string_wins(stop: tuple[str, ...], expected: str, stopped_by: str | None) -> None:
    stream = make_stream(stop=stop, tokenizer=BYTE_LEVEL)
    delivered = ""
    # The whole of "non stop" in few tokens, so that several stop strings become complete at once.
    for token_id in [*ids_of("non"), 256 + ODD_TOKENS.index(b" stop")]:
        delivered += stream.add(token_id)
        if stream.stopped_by is not None:
            break
    else:
        delivered += stream.finish()

    assert (delivered, stream.stopped_by) == (expected, stopped_by)


def test_beginning_of_a_stop_string_is_released_when_it_turns_out_to_be_none() -> None:
    stream = make_stream(stop=["stop"], tokenizer=BYTE_LEVEL)

    assert [stream.add(token_id) for token_id in ids_of("asto")] == ["a", "", "", ""]
    assert stream.add(ord("x")) == "stox"
    assert [stream.add(token_id) for token_id in ids_of("st")] == ["", ""]
    assert stream.finish() == "st"
    assert stream.stopped_by is None


def test_stop_string_that_is_not_looked_for_is_not_held_back() -> None:
    stream = make_stream(stop=["b"], tokenizer=BYTE_LEVEL)

    assert [stream.add(token_id, check_stop=False) for token_id in b"ab"] == ["a", "b"]
    assert stream.add(ord("c")) == "c"
    assert stream.stopped_by is None


def test_half_a_character_at_the_end_is_delivered_as_the_replacement() -> None:
    stream = make_stream(tokenizer=BYTE_LEVEL)
    assert stream.add("é".encode()[0]) == ""

    assert stream.finish() == REPLACEMENT


def test_nothing_is_delivered_twice_at_the_end() -> None:
    stream = make_stream(stop=["xyz"], tokenizer=BYTE_LEVEL)
    delivered = "".join(stream.add(token_id) for token_id in ids_of("axy"))

    assert delivered + stream.finish() == "axy"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.lists(st.integers(1, 5), max_size=12))
@settings(deadline=None, max_examples=100)
def test_spaces_between_context_and_text_are_kept(context: list[int], ids: list[int]) -> None:
    stream = make_stream(context=context, tokenizer=METASPACE)
    pieces = [stream.add(token_id) for token_id in ids]

    whole = METASPACE.decode([*context, *ids])
    assert "".join(pieces) + stream.finish() == whole[len(METASPACE.decode(context)) :]


def test_long_text_is_decoded_in_a_window() -> None:
    class Counting:
        longest = 0

        def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, **kwargs: Any) -> str:
            self.longest = max(self.longest, len(token_ids))
            return "".join("abc"[i] for i in token_ids)

    tokenizer = Counting()
    stream = TextStream(tokenizer, context=[0] * 500, stop=(), skip_special_tokens=True)
    delivered = "".join(stream.add(i % 3) for i in range(500))

    assert delivered == "".join("abc"[i % 3] for i in range(500))
    assert tokenizer.longest <= 2 * TextStream.WINDOW
