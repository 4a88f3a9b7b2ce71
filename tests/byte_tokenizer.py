"""A tokenizer whose tokens are bytes, with a chat template: what HTTP and the runtime need of transformers' own."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.index0 and messages[loop.index0 - 1]['role'] == message['role'] %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ByteTokenizer:
    """Token i is byte i; a text begins with BOS. Bytes that are no UTF-8 read as U+FFFD.

    Its chat template writes `<role>content` a message and refuses two of one role in a row.
    """

    all_special_ids: Sequence[int] = (BOS_ID, EOS_ID)
    special_tokens_map: Mapping[str, str] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    added_tokens_decoder: Mapping[int, Any] = {}
    chat_template: str | None = CHAT_TEMPLATE

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        ids = list(text.encode("utf-8"))
        return {"input_ids": [BOS_ID, *ids] if add_special_tokens else ids}

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        parts: list[str] = []
        for is_special, group in itertools.groupby(token_ids, key=lambda i: i >= BOS_ID):
            ids = list(group)
            if not is_special:
                parts.append(bytes(ids).decode("utf-8", "replace"))
            elif not skip_special_tokens:
                parts.extend("<bos>" if i == BOS_ID else "<eos>" for i in ids)
        return "".join(parts)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Names as sentencepiece gives them to bytes."""
        return [f"<0x{i:02X}>" if i < BOS_ID else self.decode([i]) for i in ids]

    def get_chat_template(self) -> str:
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        return self.chat_template

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str:
        # Takes long to import, and few tests need it.
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered, _ = render_jinja_template(
            [conversation], chat_template=chat_template, add_generation_prompt=add_generation_prompt
        )
        text: str = rendered[0]
        return text
