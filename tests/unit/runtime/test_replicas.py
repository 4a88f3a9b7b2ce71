"""What other servers changed is followed up here, also when the store is away at the first try."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prompt_store.changes import Change
from prompt_store.store import PromptStore
from server.errors import StoreUnavailableError
from server.metrics import Metrics
from server.runtime import replicas
from server.runtime.replicas import ReplicaWatch
from tests.unit.prompt_store.prompt_files import BACKBONE

DEADLINE_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with PromptStore.open(tmp_path / "store", backbone=BACKBONE) as opened:
        yield opened


@pytest.fixture
def start(store: PromptStore) -> Iterator[Callable[[Callable[[], None]], ReplicaWatch]]:
    watch = ReplicaWatch(store, Metrics())

    def started(refresh: Callable[[], None]) -> ReplicaWatch:
        watch.start(refresh)
        return watch

    yield started
    watch.stop()
    watch.stop()


@pytest.mark.parametrize("error", [StoreUnavailableError("The store is away."), RuntimeError("a defect")])
def test_change_that_could_not_be_followed_up_is_tried_again_without_another(
    store: PromptStore,
    start: Callable[[Callable[[], None]], ReplicaWatch],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "RETRY_S", 0.01)
    tried, followed = [], threading.Event()

    def refresh() -> None:
        tried.append(1)
        if len(tried) < 3:
            raise error
        followed.set()

    start(refresh)
    store.lost_track()
    assert followed.wait(DEADLINE_S)
    # Then there is nothing left to try.
    assert not _is_tried_again(tried)


def test_server_that_tries_again_is_stopped_without_waiting(
    store: PromptStore, start: Callable[[Callable[[], None]], ReplicaWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "RETRY_S", 1000.0)
    tried = threading.Event()

    def refresh() -> None:
        tried.set()
        raise StoreUnavailableError("The store is away.")

    watch = start(refresh)
    changes: list[Change] = []
    store.changed(changes)
    assert tried.wait(DEADLINE_S)
    stopping = threading.Thread(target=watch.stop, daemon=True)
    stopping.start()
    stopping.join(DEADLINE_S)
    assert not stopping.is_alive()


def _is_tried_again(tried: list[int]) -> bool:
    threading.Event().wait(3 * replicas.GATHER_S)
    return len(tried) > 3
