"""What all tests share: a quiet, offline transformers, and tiny backbones made once a run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.postgresql import PostgresServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random fp32 model of a family, with its tokenizer: `tiny_backbone_folder("llama")`."""
    from tests.factories import save_tiny_backbone

    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_backbone(family, tmp_path_factory.mktemp("backbones") / family)
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the tests' own. Where none is installed, tests that ask for it fail: see tests/postgresql.py."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()
