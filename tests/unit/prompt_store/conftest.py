from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import BACKBONE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[PromptStore]:
    with PromptStore.open(root, backbone=BACKBONE) as opened:
        yield opened
