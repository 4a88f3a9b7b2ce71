"""Texts of whole pages for the tests of kept texts, and what their pages are known by."""

from collections.abc import Iterable

from server.engine.pages import PAGE_SIZE, content_of_text, text_root


def page_ends(k: int, num_tokens: int) -> list[int]:
    """Up to which token each full page of text reaches."""
    return [end for end in range(1, num_tokens + 1) if (k + end) % PAGE_SIZE == 0]


def make_tokens(k: int, letters: Iterable[int], num_more: int = 0) -> list[int]:
    """Tokens of full pages that differ in their last token only, and `num_more` tokens after them."""
    tokens: list[int] = []
    for letter in letters:
        tokens += [7] * (PAGE_SIZE - (k + len(tokens)) % PAGE_SIZE - 1) + [letter]
    return tokens + [7] * num_more


def chain(tenant: str, prefix_key: str | None, k: int, tokens: list[int]) -> list[int]:
    """The content ids of the full pages of a text."""
    contents, content, first = [], text_root(tenant, prefix_key), 0
    for end in page_ends(k, len(tokens)):
        content = content_of_text(content, tokens[first:end])
        contents.append(content)
        first = end
    return contents
