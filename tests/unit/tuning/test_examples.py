"""Three formats of examples, and errors that name file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import make_tokenizer
from tuning import examples
from tuning.examples import MAX_PROBLEMS, DataError, Example, parse_examples, read_examples

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lines(*values: Any) -> list[bytes]:
    return [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]


def problems(*values: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        parse_examples(lines(*values), "data.jsonl", **options)
    return str(caught.value).splitlines()


def test_prompts_and_completions_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a ->", "completion": " b"}\r\n\n{"completion":"c\\n", "prompt":" d"}')

    found = read_examples(path)

    assert found == (Example("a ->", " b"), Example(" d", "c\n"))
    assert [(example.file, example.line) for example in found] == [(str(path), 1), (str(path), 3)]


def test_text_goes_into_the_template_and_its_label_behind_a_space() -> None:
    found = parse_examples(
        lines({"text": "good {text}", "label": "positive"}, {"text": "bad", "label": 0}),
        "data",
        template="Review: {text}\nMood:",
    )
    assert found == (
        Example("Review: good {text}\nMood:", " positive", label="positive"),
        Example("Review: bad\nMood:", " 0", label="0"),
    )


def test_last_message_is_what_is_learnt_as_the_template_writes_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    (found,) = parse_examples(lines({"messages": messages}), "data", tokenizer=tokenizer)
    assert found == Example("<system> Be brief.</s><user> Hello</s><assistant>", " Hi", is_rendered=True)


def test_template_that_rewrites_what_was_before_leaves_the_answer_as_it_is() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if add_generation_prompt %}?{% else %}!{% endif %}{{ messages[-1]['content'] }}"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Hi "}]
    (found,) = parse_examples(lines({"messages": messages}), "data", tokenizer=tokenizer)
    assert (found.prompt, found.completion) == ("?Hello", " Hi ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nope", "data.jsonl:2: is not JSON"),
        (b'["a"]', "data.jsonl:2: is not a JSON object"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "data.jsonl:2: holds a duplicate key"),
        (b"\xff{}", "data.jsonl:2: is not UTF-8 text"),
        ({"prompt": "a"}, 'data.jsonl:2: completion: is missing; the first line of this file has "completion" and'),
        ({"prompt": "a", "completion": "b", "id": 1}, "data.jsonl:2: id: is not known here; leave it out"),
        ({"text": "a", "label": "b"}, "data.jsonl:2: completion: is missing"),
        ({"prompt": 3, "completion": "b"}, "data.jsonl:2: prompt: must be a text, found a number"),
        ({"prompt": "a", "completion": None}, "data.jsonl:2: completion: must be a text, found null"),
        ({"prompt": "a", "completion": " \n"}, "data.jsonl:2: completion: must not be empty"),
        ({"prompt": "\ud800", "completion": "b"}, "data.jsonl:2: prompt: holds half a surrogate pair"),
        ({"prompt": "a" * 1_000_001, "completion": "b"}, "data.jsonl:2: prompt: has 1000001 characters"),
        (b" " * 4_194_303 + b"{}", "data.jsonl:2: is longer than 4194304 bytes"),
    ],
)
def test_wrong_line_is_named_with_its_field_and_what_was_found(line: Any, message: str) -> None:
    (found,) = problems({"prompt": "a", "completion": "b"}, line)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (True, "label: must be a text, found a truth value"),
        (1.5, "label: must be a text, found a number"),
        (" a", "label: must have neither space around it"),
        ("a" * 201, "label: has 201 characters, at most 200"),
    ],
)
def test_wrong_label_is_refused(label: Any, message: str) -> None:
    assert problems({"text": "a", "label": label})[0].startswith(f"data.jsonl:1: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: must be a list of 2 to 1000 messages"),
        ("hello", "messages: must be a list of 2 to 1000 messages, found 'hello'"),
        ([{"role": "user", "content": "a"}] * 2, "messages: must end with the assistant's answer"),
        ([{"role": "tool", "content": "a"}] * 2, "messages[0].role: must be one of system, user, assistant"),
        ([{"role": "user", "content": "a", "weight": 1}] * 2, 'messages[0]: must be {"role", "content"} and nothing'),
        ([{"role": "user", "content": [1]}] * 2, "messages[0].content: must be a text, found a list"),
    ],
)
def test_wrong_messages_are_refused_with_their_place(messages: Any, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    assert problems({"messages": messages}, tokenizer=tokenizer)[0].startswith(f"data.jsonl:1: {message}")


def test_messages_need_a_template_that_takes_them() -> None:
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert "the backbone has no chat template" in problems(line)[0]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "refuses them: roles must alternate" in problems(line, tokenizer=tokenizer)[0]


def test_first_line_that_is_of_no_format_says_what_to_write() -> None:
    assert problems({"input": "a", "output": "b"}, {"input": 1}) == [
        'data.jsonl:1: has the fields "input" and "output"; write one of {"prompt", "completion"}, {"text", "label"} '
        'and {"messages": [{"role", "content"}, …]}'
    ]
    assert "has the fields" in problems({"prompt": "a", "completion": "b", "text": "c", "label": "d"})[0]
    assert "holds no example" in problems(b"", b"  ")[0]


def test_all_wrong_lines_are_named_up_to_a_limit() -> None:
    wrong = [{"prompt": "a", "completion": ""}] * (MAX_PROBLEMS + 7)
    found = problems({"prompt": "a", "completion": "b"}, *wrong)
    assert [line.partition(": ")[0] for line in found[:-1]] == [f"data.jsonl:{n}" for n in range(2, MAX_PROBLEMS + 2)]
    assert found[-1] == "… and 7 more lines like these"


def test_too_many_examples_or_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_EXAMPLES", 3)
    monkeypatch.setattr(examples, "MAX_LABELS", 2)
    assert "more than the 3 examples" in problems(*[{"prompt": "a", "completion": "b"}] * 4)[0]
    assert "3 different labels, at most 2" in problems(*[{"text": "a", "label": str(n)} for n in range(3)])[0]


def test_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 64)
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    path.write_text(good + "x" * 1000 + "\n" + good + '{"prompt": "a"}\n')
    with pytest.raises(DataError) as caught:
        read_examples(path, name="mine")
    # What was left of the long line is passed over, and lines are counted on.
    assert [(p.file, p.line) for p in caught.value.problems] == [("mine", 2), ("mine", 4)]


def test_file_that_cannot_be_read_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        read_examples(tmp_path / "nowhere.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "completion", "text", "label", "messages", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(st.lists(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_whatever_is_in_a_file_is_read_or_refused(content: list[bytes]) -> None:
    try:
        found = parse_examples(content, "data")
    except DataError:
        return
    assert all(example.prompt.strip() and example.completion.strip() for example in found)
