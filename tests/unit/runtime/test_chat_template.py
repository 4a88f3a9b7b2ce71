"""Conversations rendered by a real tokenizer's own template, and templates that fail in every way."""

import pytest
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequestError
from server.runtime.chat_template import MAX_REASON_CHARS, ChatTemplate
from tests.factories import make_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def make(template: object) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def template_of(template: object) -> ChatTemplate:
    found = ChatTemplate.of(make(template))
    assert found is not None
    return found


def test_rendering_is_the_tokenizers_own() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    template = template_of(source)

    assert template.source == source
    assert template.render(MESSAGES, add_generation_prompt=True) == "<bos>[user]hi>"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<bos>[user]hi"


def test_tokenizer_without_a_template_has_none() -> None:
    assert ChatTemplate.of(make(None)) is None
    assert ChatTemplate.of(make({"tools": "x"})) is None


def test_the_default_of_several_is_taken_and_later_changes_are_not() -> None:
    tokenizer = make({"default": "D", "tool_use": "T"})
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    tokenizer.chat_template = "changed"

    assert template.render(MESSAGES, add_generation_prompt=True) == "D"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('Only\n questions, please.') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        template_of(source).render(MESSAGES, add_generation_prompt=True)

    assert refused.value.param == "messages"
    assert refused.value.message.startswith("messages: ")
    if "raise_exception" in source:
        assert "Only questions, please." in refused.value.message


def test_a_templates_reason_is_cut_short() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        template_of("{{ raise_exception('x' * 10000) }}").render(MESSAGES, add_generation_prompt=True)

    assert "x" * MAX_REASON_CHARS in refused.value.message
    assert len(refused.value.message) < MAX_REASON_CHARS + 100
