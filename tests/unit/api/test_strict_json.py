"""Bodies that Python's own reader would take and this one does not."""

import contextlib
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import strict_json
from server.api.strict_json import MAX_INLINE_BYTES, parse_json
from server.errors import InvalidRequestError
from tests.unit.api.live_server import LiveServer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("size", [0, MAX_INLINE_BYTES], ids=["short", "long"])
@given(value=JSON)
def test_sound_json_reads_as_pythons_own_reader_reads_it(size: int, value: object) -> None:
    body = json.dumps(value).encode() + b" " * size

    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"a": NaN}', "a"),
        (b'{"a": {"b": [1, -Infinity]}}', "a.b.1"),
        (b'{"a": 1.0, "b": 1e999}', "b"),
        (b"[0, -1e999]", "1"),
        (b"Infinity", None),
        (b'{"a": {"x": 1, "x": 1}}', "x"),
        (b"\xff", None),
        (b"{'a': 1}", None),
        (b"", None),
        (b"[" * 100_000, None),
        (b"1" * 10_000, None),
        (b"1" * 10_000 + b" " * MAX_INLINE_BYTES, None),
    ],
)
def test_what_is_not_one_value_is_refused_by_name(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_json(body)
    assert refused.value.param == param


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    with contextlib.suppress(InvalidRequestError):
        parse_json(body)


@pytest.mark.parametrize(("num_chars", "is_in_thread"), [(10, False), (MAX_INLINE_BYTES, True)])
def test_a_long_body_is_not_read_on_the_event_loop(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, num_chars: int, is_in_thread: bool
) -> None:
    threads: list[str] = []

    def noted(body: bytes) -> object:
        threads.append(threading.current_thread().name)
        return parse_json(body)

    monkeypatch.setattr(strict_json, "parse_json", noted)
    answer = server.post({"model": "tiny/echo", "prompt": "x", "user": "u" * num_chars})

    assert answer.status_code == (400 if is_in_thread else 200)
    assert [name != "live-server" for name in threads] == [is_in_thread]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"model": "x", "messages": []}, "messages: has fewer than 1 items."),
        ("/v1/classify", {"model": "x", "input": "x", "labels": ["a"]}, "labels: has fewer than 2 items."),
        ("/v1/classify", {"model": "x", "input": "x", "labels": ["", "a"]}, "labels.0: has fewer than 1 characters."),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [1] * 129}, "stop_token_ids: has more than 128 items."),
        ("/v1/completions", {"prompt": "x", "user": "u" * 513}, "user: has more than 512 characters."),
    ],
)
def test_bounds_of_lists_and_texts_are_told_in_words(
    server: LiveServer, path: str, body: dict[str, object], message: str
) -> None:
    with server.client() as client:
        response = client.post(path, json=body)

    assert (response.status_code, response.json()["error"]["message"]) == (400, message)
