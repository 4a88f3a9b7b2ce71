"""Token texts and offsets against a real transformers tokenizer's own decoding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.runtime.tokens import EDGE_TOKENS, REPLACEMENT, OffsetCounter, TokenCodec, TooManyTokensError
from tests.fakes import BOS_ID, VOCAB_SIZE, ByteTokenizer


def make_byte_level() -> TokenCodec:
    """Like GPT-2's: each token is bytes, a space belongs to the word behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)} | {"ĠParis": 256, "<s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return TokenCodec(fast, len(vocabulary))


def make_metaspace() -> TokenCodec:
    """Like Llama 2's: decoding drops the space of the first token."""
    vocabulary = {"<unk>": 0, "▁Paris": 1, "▁is": 2, "s": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(vocabulary))


def test_tokens_of_both_families_keep_their_space() -> None:
    assert make_byte_level().text_of(256) == " Paris"
    assert make_metaspace().text_of(1) == " Paris"
    assert make_metaspace().text_of(3) == "s"


def test_special_token_has_its_name() -> None:
    assert make_byte_level().text_of(257) == "<s>"
    assert 257 in make_byte_level().special_ids


def test_half_a_character_reads_as_the_replacement() -> None:
    assert TokenCodec(ByteTokenizer(), VOCAB_SIZE).text_of("é".encode()[0]) == REPLACEMENT


@given(st.text(max_size=40))
def test_every_character_begins_where_its_first_byte_does(text: str) -> None:
    codec = TokenCodec(ByteTokenizer(), VOCAB_SIZE)
    counter = OffsetCounter(codec, skip_special_tokens=True)

    found = [counter.advance(token_id) for token_id in codec.encode(text, add_special_tokens=True)]

    expected = [0] + [index for index, character in enumerate(text) for _ in character.encode()]
    assert found == expected


def test_special_tokens_take_room_when_they_are_shown() -> None:
    codec = TokenCodec(ByteTokenizer(), VOCAB_SIZE)
    counter = OffsetCounter(codec, skip_special_tokens=False)

    assert [counter.advance(token_id) for token_id in (BOS_ID, ord("a"), ord("b"))] == [0, 5, 6]


@given(st.lists(st.integers(128, 255), min_size=1, max_size=30))
def test_bytes_that_never_become_a_character_are_not_held_for_ever(ids: list[int]) -> None:
    codec = TokenCodec(ByteTokenizer(), VOCAB_SIZE)
    counter = OffsetCounter(codec, skip_special_tokens=True)
    offsets = [counter.advance(token_id) for token_id in ids]

    assert offsets == sorted(offsets)
    assert len(counter._held) < 4


@pytest.mark.parametrize("text", ["plain", "", "naïve 日本 🎉"])
def test_encode_and_decode_are_inverse(text: str) -> None:
    codec = TokenCodec(ByteTokenizer(), VOCAB_SIZE)

    assert codec.decode(codec.encode(text, add_special_tokens=True), skip_special_tokens=True) == text


def make_byte_fallback() -> TokenCodec:
    """Like Llama 2's: bytes that no word has are tokens of their own, named by their number."""
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "a": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(vocabulary))


@pytest.mark.parametrize("codec", [make_byte_level(), make_byte_fallback()], ids=["byte-level", "byte-fallback"])
def test_parts_of_a_character_have_the_bytes_that_they_are(codec: TokenCodec) -> None:
    names = {name: token_id for token_id, name in enumerate(codec.names(range(codec.vocab_size)))}
    first, second = ("<0xC3>", "<0xA9>") if "<0xC3>" in names else ("Ã", "©")

    assert codec.bytes_of(names[first]) + codec.bytes_of(names[second]) == "é".encode()
    assert codec.text_of(names[first]) == REPLACEMENT
    assert codec.bytes_of(names["a"]) == b"a"


def test_every_byte_of_a_byte_level_vocabulary_is_found() -> None:
    codec = make_byte_level()

    assert sorted(codec.bytes_of(token_id) for token_id in range(256)) == [bytes([byte]) for byte in range(256)]
    assert codec.bytes_of(256) == b" Paris"
    assert codec.bytes_of(257) == b"<s>"


def test_special_tokens_have_their_roles() -> None:
    assert make_byte_level().special_tokens() == {"bos_token": "<s>"}


def make_bpe(merges: int) -> TokenCodec:
    """A byte-level vocabulary that also has runs of `a`: of 2, 4, 8 and so on, `merges` times."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    pairs = []
    for power in range(merges):
        run = "a" * 2**power
        pairs.append((run, run))
        vocabulary[run + run] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(vocabulary))


BPE = make_bpe(5)


@pytest.mark.parametrize("codec", [BPE, TokenCodec(ByteTokenizer(), VOCAB_SIZE)], ids=["bpe", "bytes"])
@settings(max_examples=40)
@given(
    piece=st.text(st.sampled_from("aé 𝄞b\n"), min_size=1, max_size=9),
    times=st.integers(1, 1000),
    max_tokens=st.integers(1, 700),
)
def test_text_within_its_limit_is_encoded_as_ever_and_one_refused_has_more_tokens_than_that(
    codec: TokenCodec, piece: str, times: int, max_tokens: int
) -> None:
    text = piece * times
    whole = codec.encode(text, add_special_tokens=True)
    try:
        found = codec.encode_within(text, add_special_tokens=True, max_tokens=max_tokens)
    except TooManyTokensError as error:
        found, at_least = None, error.at_least

    if found is None:
        assert max_tokens < at_least <= len(whole)
    else:
        assert found == whole


def test_text_of_one_long_token_whose_beginning_has_many_is_not_refused() -> None:
    word = "abcdefghijklmnopqrstuvwxyz"
    ends = [word[start:] for start in range(len(word) - 1, -1, -1)]
    vocabulary = {token: index for index, token in enumerate([*word, *ends[1:]])}
    merges = [(end[0], end[1:]) for end in ends[1:]]
    codec = TokenCodec(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges))), len(vocabulary)
    )

    assert len(codec.encode(word[:8], add_special_tokens=True)) == 8
    assert codec.encode_within(word, add_special_tokens=True, max_tokens=1) == (vocabulary[word],)


def test_text_that_ends_in_a_token_which_takes_all_white_space_before_it_is_not_refused() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    codec = TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 257)
    text = "a" + "\n" * 3000 + "<mask>"

    found = codec.encode_within(text, add_special_tokens=True, max_tokens=10)

    assert found == codec.encode(text, add_special_tokens=True)
    assert len(found) == 2


def test_text_that_is_far_too_long_costs_no_more_than_a_few_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    num_chars: list[int] = []
    encode = TokenCodec.encode

    def counted(self: TokenCodec, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        num_chars.append(len(text))
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(TokenCodec, "encode", counted)
    # A token of this vocabulary has at most 32 characters.
    for text, most in (("b " * 500_000, 8 * 1000), ("a" * 1_000_000, 4 * 32 * (1000 + EDGE_TOKENS))):
        num_chars.clear()
        with pytest.raises(TooManyTokensError):
            BPE.encode_within(text, add_special_tokens=True, max_tokens=1000)
        assert sum(num_chars) <= most
