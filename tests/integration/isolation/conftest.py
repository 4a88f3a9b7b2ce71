from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.isolation.driver import OVERLAPS
from tests.integration.isolation.world import World, make_world


@pytest.fixture(scope="session")
def world_of(
    tiny_backbone_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], World]:
    """The world of a family, made once a run: `world_of("gemma2")`."""
    worlds: dict[str, World] = {}

    def of(family: str) -> World:
        if family not in worlds:
            worlds[family] = make_world(family, tiny_backbone_folder(family), tmp_path_factory.mktemp(family))
        return worlds[family]

    return of


@pytest.fixture(params=[False, True], ids=["apart", "overlapped"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Engines collect each step at once, and then once more launch the next one before."""
    overlaps: bool = request.param
    monkeypatch.setattr(OVERLAPS, overlaps)
    return overlaps
