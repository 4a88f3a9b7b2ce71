"""What a JSON body may be made of, held against what Python's own reader finds in it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import json_bounds
from server.api.json_bounds import MAX_DEPTH, MAX_FIELDS, MAX_ITEMS, check_bounds
from server.api.strict_json import MAX_KEYS, parse_json
from server.errors import InvalidRequestError
from tests.unit.api.live_server import LiveServer

# Texts full of what makes structure outside of them.
TEXTS = st.text(st.sampled_from('[]{}:,"\\é\n'), max_size=6)
JSON = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def measure(value: Any) -> tuple[int, int, int]:
    """Depth, fields, and texts, objects and lists, of a value that was read."""
    if isinstance(value, str):
        return 0, 0, 1
    children: list[Any] = []
    num_fields = 0
    if isinstance(value, dict):
        children, num_fields = list(value.values()), len(value)
    elif isinstance(value, list):
        children = value
    else:
        return 0, 0, 0
    found = [measure(child) for child in children]
    return (
        1 + max((depth for depth, _, _ in found), default=0),
        num_fields + sum(fields for _, fields, _ in found),
        # A field's name is a text.
        1 + num_fields + sum(items for _, _, items in found),
    )


def is_refused(body: bytes) -> bool:
    try:
        check_bounds(body)
    except InvalidRequestError:
        return True
    return False


@pytest.mark.parametrize("is_ascii", [True, False])
@given(value=JSON, bounds=st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 12)))
def test_body_is_refused_exactly_when_what_is_read_of_it_is_beyond_a_bound(
    is_ascii: bool, value: Any, bounds: tuple[int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in zip(("MAX_DEPTH", "MAX_FIELDS", "MAX_ITEMS"), bounds, strict=True):
            patch.setattr(json_bounds, name, bound)
        is_beyond = any(found > bound for found, bound in zip(measure(value), bounds, strict=True))

        assert is_refused(json.dumps(value, ensure_ascii=is_ascii).encode()) == is_beyond


@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{}:,"\\a'), max_size=60).map(str.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "MAX_DEPTH", 2)
        is_refused(body)


def test_bounds_are_what_is_allowed() -> None:
    assert not is_refused(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert is_refused(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    assert not is_refused(b'{"a":1}'.join([b""] * MAX_FIELDS))
    assert is_refused(b'{"a":1}' * (MAX_FIELDS + 1))
    assert not is_refused(b'"",' * MAX_ITEMS)
    assert is_refused(b'"",' * (MAX_ITEMS + 1))
    assert len(parse_json(json.dumps(dict.fromkeys(map(str, range(MAX_KEYS)))).encode())) == MAX_KEYS
    with pytest.raises(InvalidRequestError, match="1024 fields"):
        parse_json(json.dumps(dict.fromkeys(map(str, range(MAX_KEYS + 1)))).encode())


def test_what_closes_more_than_was_opened_is_not_read_to_its_end() -> None:
    looked_at: list[int] = []

    class Body(bytes):
        def __getitem__(self, index: Any) -> Any:
            looked_at.append(index)
            return super().__getitem__(index)

    check_bounds(Body(b'{"a":"' + b":" * (MAX_FIELDS + 1) + b'"' + b"]" * 100_000))

    assert len(looked_at) < 10


def many_fields() -> bytes:
    return b'{"model":"tiny/echo","prompt":"x",' + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}"


def many_objects() -> bytes:
    messages = b",".join(b'{"%d":1}' % i for i in range(300_000))
    return b'{"model":"tiny/echo","messages":[' + messages + b"]}"


def many_tasks() -> bytes:
    return b'{"prompt":"x","tasks":[' + b"1," * 60_000 + b"1]}"


def deep_nan() -> bytes:
    return b'{"user":' + b"[" * 900 + b"NaN" + b"]" * 900 + b"}"


@pytest.mark.parametrize(
    ("path", "make", "message"),
    [
        ("/v1/completions", many_fields, "The body has more than 8192 fields."),
        ("/v1/chat/completions", many_objects, "The body has more than 8192 fields."),
        ("/v1/completions", many_tasks, "tasks.0: must be a string."),
        ("/v1/completions", deep_nan, "The body is nested more than 64 deep."),
    ],
)
def test_hostile_body_is_refused_before_it_costs_anything_like_its_fields(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, make: Any, message: str
) -> None:
    num_errors: list[int] = []
    from server.api import errors

    real = errors.from_validation
    monkeypatch.setattr(errors, "from_validation", lambda found: (num_errors.append(len(found)), real(found))[1])
    with server.client() as client:
        response = client.post(path, content=make(), headers={"content-type": "application/json"})

    assert (response.status_code, response.json()["error"]["message"]) == (400, message)
    assert sum(num_errors) <= MAX_KEYS
