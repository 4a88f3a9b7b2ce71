"""Conversations as the text that the backbone was trained to read: its own chat template, fixed when the server starts.

Owns the rendering and what becomes of a template's refusal. Neither a template nor an argument of one ever comes from a
request. Refuses to know HTTP, and how the text is tokenised.
"""

from collections.abc import Sequence

from jinja2.exceptions import TemplateError

from server.errors import InvalidRequestError
from server.runtime.protocols import Tokenizer

MAX_REASON_CHARS = 200


class ChatTemplate:
    """Renders conversations. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = source

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The tokenizer's own; None when it has none, or several of which none is the default."""
        try:
            return cls(tokenizer, tokenizer.get_chat_template())
        except ValueError:
            return None

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.

        Takes time that grows with the messages: long ones belong in a thread. Raises InvalidRequestError when the
        template refuses the messages, for instance because of the order of their roles.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            # What a template's author says of wrong messages; of what the client sent it can hold no secret.
            reason = " ".join((error.message or "").split())[:MAX_REASON_CHARS]
            raise InvalidRequestError(
                f"messages: the backbone's chat template refuses them: {reason}", param="messages"
            ) from error
        except Exception as error:
            # A template is a program over the client's values: it may fail in any way, and not by the server's fault.
            raise InvalidRequestError(
                "messages: the backbone's chat template cannot render them", param="messages"
            ) from error
        assert isinstance(text, str)
        return text
