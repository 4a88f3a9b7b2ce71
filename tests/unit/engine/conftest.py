"""One tiny backbone for the engine's tests, loaded once a run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.backbone import Backbone


@pytest.fixture(scope="session")
def llama(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    """A tiny random fp32 llama (grouped queries) that is served packed."""
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu", max_model_len=256)
