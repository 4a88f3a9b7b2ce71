"""One tiny backbone for the engine's tests, loaded once a run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.backbone import Backbone
from tests.factories import TEST_DEVICE
from tests.unit.engine.stepped import OVERLAPS


@pytest.fixture(scope="session")
def llama(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    """A tiny random fp32 llama (grouped queries) that is served packed."""
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device=TEST_DEVICE, max_model_len=256)


@pytest.fixture(params=[False, True], ids=["apart", "overlapped"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Stepped engines collect each step at once, and then once more launch the next one before."""
    overlaps: bool = request.param
    monkeypatch.setattr(OVERLAPS, overlaps)
    return overlaps
