"""Events are the same however the bytes are cut, and are read as the standard's examples say."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.sse import Event, EventParser

LINES = ["data: a", "data: é\u2028", "data", "event: error", ": c", "", "id: 3"]


def parse(*pieces: bytes) -> list[Event]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_data_lines_comments_and_named_events_are_told_apart() -> None:
    stream = b': ping\n\ndata: {"a":1}\n\nevent: error\n: it broke\ndata: {"error":{}}\n\ndata: [DONE]\n\n'

    assert parse(stream) == [
        Event("message", '{"a":1}'),
        Event("error", '{"error":{}}'),
        Event("message", "[DONE]"),
    ]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event("message", "YHOO\n+2\n10")]),
        (b"data\n\ndata\ndata\n\ndata:", [Event("message", ""), Event("message", "\n")]),
        (b"data:test\n\ndata: test\n\n", [Event("message", "test"), Event("message", "test")]),
        (b"data:  two spaces\n\n", [Event("message", " two spaces")]),
        (b"id: 1\nretry: 5\nunknown: x\n\n", []),
        (b"event: gone\n\ndata: x\n\n", [Event("message", "x")]),
        ("data: \u2028é\n\n".encode(), [Event("message", "\u2028é")]),
        (b"data: cut", []),
    ],
)
def test_streams_of_the_standard(stream: bytes, expected: list[Event]) -> None:
    assert parse(stream) == expected


def test_a_pair_of_line_ends_that_is_cut_in_two_is_one() -> None:
    assert parse(b"data: a\r", b"\ndata: b\r\n\r", b"\n: end\r\n") == [Event("message", "a\nb")]


@given(
    lines=st.lists(
        st.sampled_from(["data: a", "data: é\u2028", "data", "event: error", ": c", "", "id: 3"]), max_size=12
    ),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_events_do_not_depend_on_where_the_bytes_are_cut(lines: list[str], ends: str, cuts: list[int]) -> None:
    # Something follows, so that a lone carriage return is known to be no half of a pair.
    stream = "".join(line + ends for line in [*lines, "", "data: last", "", ": end"]).encode()
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]

    pieces = [stream[a:b] for a, b in pairwise(at)]
    plain = "".join(f"{line}\n" for line in [*lines, "", "data: last", "", ": end"]).encode()
    assert parse(*pieces) == parse(plain)
    assert parse(*(bytes([byte]) for byte in stream)) == parse(plain)
    assert parse(plain)[-1] == Event("message", "last")
