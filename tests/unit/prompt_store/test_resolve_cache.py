from datetime import UTC, datetime
from typing import Any

from prompt_store.errors import StorageFailed
from prompt_store.manifest import PromptVersion, Provenance
from prompt_store.resolve_cache import ResolveCache, Resolved

KEY = ("t", "task")


def make_resolved(number: int) -> Resolved:
    now = datetime.now(UTC)
    version = PromptVersion(
        tenant="t",
        task="task",
        version=number,
        digest="0" * 64,
        prefix_key="k",
        peft_type="PROMPT_TUNING",
        kind="embeddings",
        task_index=None,
        num_virtual_tokens=1,
        num_bytes=1,
        created_at=now,
        created_by="",
        backbone="",
        state="active",
        metadata={},
        provenance=Provenance(
            training_run=None,
            data_digest=None,
            key_id=None,
            key_label=None,
            uploaded_at=now,
            backbone_name=None,
            backbone_fingerprint="",
        ),
    )
    return Resolved(version)


class World:
    """A clock and a change counter that the test moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.token: int | None = 0
        self.num_polls = 0
        self.fails = False

    def change_token(self) -> int | None:
        self.num_polls += 1
        if self.fails:
            raise StorageFailed("no disk")
        return self.token


def make_cache(world: World, max_entries: int = 10, **options: Any) -> ResolveCache:
    cache = ResolveCache(world.change_token, clock=lambda: world.now, max_entries=max_entries, **options)
    world.num_polls = 0
    return cache


def test_what_was_put_is_found_until_this_process_writes() -> None:
    cache = make_cache(World())
    resolved = make_resolved(1)
    cache.put(KEY, resolved, cache.generation)
    assert cache.get(KEY) is resolved
    cache.clear()
    assert cache.get(KEY) is None


def test_what_was_read_before_a_write_is_not_remembered_after_it() -> None:
    cache = make_cache(World())
    generation = cache.generation
    cache.clear()
    cache.put(KEY, make_resolved(1), generation)
    assert cache.get(KEY) is None


def test_foreign_changes_are_looked_for_once_an_interval() -> None:
    world = World()
    cache = make_cache(world)
    cache.put(KEY, make_resolved(1), cache.generation)
    world.token = 1
    for _ in range(10):
        assert cache.get(KEY) is not None
    assert world.num_polls == 0
    world.now = 1.0
    assert cache.get(KEY) is None
    cache.put(KEY, make_resolved(2), cache.generation)
    world.now = 2.0
    assert cache.get(KEY) is not None
    assert world.num_polls == 2


def test_everything_is_forgotten_once_an_interval_where_changes_cannot_be_seen() -> None:
    world = World()
    world.token = None
    cache = make_cache(world)
    cache.put(KEY, make_resolved(1), cache.generation)
    world.now = 1.0
    assert cache.get(KEY) is None


def test_failing_disk_does_not_stop_answers_from_memory() -> None:
    world = World()
    cache = make_cache(world)
    cache.put(KEY, make_resolved(1), cache.generation)
    world.fails, world.now = True, 1.0
    assert cache.get(KEY) is not None


def test_memory_is_bounded() -> None:
    cache = make_cache(World(), max_entries=3)
    for index in range(100):
        cache.put(("t", f"task-{index}"), make_resolved(index + 1), cache.generation)
        assert cache.num_entries <= 3
    assert cache.get(("t", "task-99")) is not None


def test_own_write_that_changes_no_meaning_leaves_everything_remembered() -> None:
    world = World()
    cache = make_cache(world)
    cache.put(KEY, make_resolved(1), cache.generation)
    with cache.unaffected():
        assert world.token == 0
        world.token = 1
    world.now = 10.0
    assert cache.get(KEY) is not None


def test_foreign_change_before_an_own_write_is_still_noticed() -> None:
    world = World()
    cache = make_cache(world)
    cache.put(KEY, make_resolved(1), cache.generation)
    world.token = 1
    with cache.unaffected():
        world.token = 2
    assert cache.get(KEY) is None


def test_a_peek_never_looks_for_foreign_changes_and_answers_nothing_when_it_is_time_to() -> None:
    world, first, second = World(), make_resolved(1), make_resolved(2)
    cache = make_cache(world)
    cache.put(KEY, first, cache.generation)
    world.token = 1
    world.now += 0.9
    assert cache.peek(KEY) is first
    world.now += 0.2
    assert cache.peek(KEY) is None
    assert cache.get(KEY) is None
    assert world.num_polls == 1
    cache.put(KEY, second, cache.generation)
    assert cache.peek(KEY) is second


def test_change_of_a_task_makes_that_name_be_forgotten_for_all_tenants_and_versions() -> None:
    cache = make_cache(World())
    keys = [("t", "task"), ("other", "task"), ("t", "task@7"), ("t", "task-2"), ("t", "other")]
    for key in keys:
        cache.put(key, make_resolved(1), cache.generation)
    generation = cache.generation
    cache.forget({"task"})
    assert [key for key in keys if cache.get(key) is not None] == [("t", "task-2"), ("t", "other")]
    cache.put(KEY, make_resolved(1), generation)
    assert cache.get(KEY) is None, "it was read before the change"
    cache.put(KEY, make_resolved(2), cache.generation)
    cache.forget({"task"})
    assert cache.num_entries == 2


def test_nothing_is_told_that_may_not_be_believed() -> None:
    believable = True
    cache = make_cache(World(), is_believable=lambda: believable)
    cache.put(KEY, make_resolved(1), cache.generation)
    assert cache.get(KEY) is cache.peek(KEY) is not None
    believable = False
    assert cache.get(KEY) is cache.peek(KEY) is None
