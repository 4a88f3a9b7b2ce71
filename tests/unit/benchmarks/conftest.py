"""A tiny random Llama in a folder, with a chat template."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.factories import save_tiny_backbone

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chat_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_backbone("llama", tmp_path_factory.mktemp("chat") / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
