"""The tiers of prompts against plain dictionaries, and the loader on its thread."""

import threading
from collections import OrderedDict

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prompt_store.manifest import SoftPrompt
from server.engine.kv import KvPool, LayerShape, StackedColumns, num_pages_for
from server.engine.pages import PAGE_SIZE, content_of_prefix
from server.engine.prefix import HostCache, LoadedPrompt, Prefix, PrefixCache, PromptLoader
from server.engine.request import PromptRef
from server.errors import PromptCorruptError, UnavailableError
from server.metrics import Metrics
from tests.unit.engine.prompts import make_ref

KEYS = ("a", "b", "c", "d", "e")
LAYERS = [LayerShape(kv_heads=1, key_dim=1, value_dim=1)]
BYTES_PER_TOKEN = 2 * 4
PAGE_BYTES = PAGE_SIZE * BYTES_PER_TOKEN


def make_tier(max_bytes: int, *, prefix_pages: int | None = None, metrics: Metrics | None = None) -> PrefixCache:
    """A device tier over a pool whose part for prefixes is as large as `max_bytes`, if nothing else is said."""
    pool = KvPool(
        LAYERS,
        row_pages=1,
        prefix_pages=prefix_pages if prefix_pages is not None else max_bytes // PAGE_BYTES,
        dtype=torch.float32,
        device=torch.device("cpu"),
        poison_freed=True,
    )
    return PrefixCache(pool, max_bytes, metrics if metrics is not None else Metrics())


def put(cache: PrefixCache, ref: PromptRef, serial: int = 1) -> Prefix | None:
    """Make a prefix of the reference's k the way `residency` does: make room, take pages, share the full ones."""
    k = ref.num_virtual_tokens
    if not cache.make_room(k):
        return None
    pool = cache._pool
    pages = pool.allocate_prefix(serial, num_pages_for(k))
    assert pages is not None, "there was room"
    num_full = k // PAGE_SIZE
    for index in range(num_full):
        pool.ledger.share(int(pages[index]), serial, content_of_prefix(ref.prefix_key, index))
    pool.release_prefix(pages[num_full:], serial)
    tail = StackedColumns((torch.zeros(1, 1, k % PAGE_SIZE, 1), torch.zeros(1, 1, k % PAGE_SIZE, 1)))
    return cache.insert(ref, pages[:num_full], tail if k % PAGE_SIZE else None)


def made(cache: PrefixCache, key: str, k: int = 1) -> Prefix:
    prefix = put(cache, make_ref(key, k=k))
    assert prefix is not None
    return prefix


def evictions(metrics: Metrics, tier: str) -> float:
    return metrics.registry.get_sample_value("promptmux_prompt_cache_evictions_total", {"tier": tier}) or 0.0


class DeviceTierSchedule(RuleBasedStateMachine):
    """Rows acquire and release, prompts arrive, are pinned and deleted; `resident` is the truth, in order of use."""

    @initialize(max_tokens=st.integers(0, 120), prefix_pages=st.integers(0, 7))
    def start(self, max_tokens: int, prefix_pages: int) -> None:
        self.max_bytes = max_tokens * BYTES_PER_TOKEN
        self.prefix_pages = prefix_pages
        self.metrics = Metrics()
        self.cache = make_tier(self.max_bytes, prefix_pages=prefix_pages, metrics=self.metrics)
        self.resident: OrderedDict[str, Prefix] = OrderedDict()
        self.holders: list[Prefix] = []
        self.sizes: dict[int, int] = {}  # k by uid
        self.pinned: frozenset[str] = frozenset()
        self.num_evicted = 0

    @rule(key=st.sampled_from(KEYS), k=st.integers(1, 50))
    def make(self, key: str, k: int) -> None:
        ref = make_ref(key, k=k)
        if ref.prefix_key in self.resident:
            with pytest.raises(RuntimeError, match="compiled twice"):
                self.cache.insert(ref, np.zeros(0, dtype=np.int32), None)
            return
        evicted = self.expected_evictions(k)
        prefix = put(self.cache, ref, serial=len(self.sizes) + 1)
        assert (prefix is None) == (evicted is None)
        for gone in evicted or []:
            assert not self.resident.pop(gone).is_alive
            self.num_evicted += 1
        if prefix is not None:
            assert prefix.uid not in self.sizes, "a uid was given twice"
            assert (prefix.key, prefix.digest, prefix.num_users) == (ref.prefix_key, ref.digest, 0)
            self.sizes[prefix.uid] = k
            self.resident[ref.prefix_key] = prefix

    @rule(key=st.sampled_from(KEYS))
    def acquire(self, key: str) -> None:
        prefix = self.cache.acquire(f"key-{key}")
        assert prefix is self.resident.get(f"key-{key}")
        if prefix is not None:
            self.resident.move_to_end(prefix.key)
            self.holders.append(prefix)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.cache.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(keys=st.frozensets(st.sampled_from(KEYS), max_size=2))
    def pin(self, keys: frozenset[str]) -> None:
        self.pinned = frozenset(f"key-{key}" for key in keys)
        self.cache.pin(self.pinned)

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        self.cache.evict(f"key-{key}")
        prefix = self.resident.pop(f"key-{key}", None)
        assert prefix is None or not prefix.is_alive

    def expected_evictions(self, k: int) -> list[str] | None:
        """The keys that must go, oldest first, for k more tokens; None: nothing goes, it would not be enough."""
        pages, num_bytes = -(-k // PAGE_SIZE), -(-k // PAGE_SIZE) * PAGE_BYTES
        left = {prefix.uid for prefix in self.counted()}
        gone: list[str] = []
        idle = [key for key, p in self.resident.items() if key not in self.pinned and not self.users(p)]
        while self.bytes_of(left) + num_bytes > self.max_bytes or self.pages_of(left) + pages > self.prefix_pages:
            if not idle:
                return None
            gone.append(idle.pop(0))
            left.discard(self.resident[gone[-1]].uid)
        return gone

    def counted(self) -> list[Prefix]:
        """The resident ones, and deleted ones that rows still hold."""
        return list({prefix.uid: prefix for prefix in (*self.resident.values(), *self.holders)}.values())

    def bytes_of(self, uids: set[int]) -> int:
        return sum(self.sizes[uid] for uid in uids) * BYTES_PER_TOKEN

    def pages_of(self, uids: set[int]) -> int:
        return sum(self.sizes[uid] // PAGE_SIZE for uid in uids)

    def users(self, prefix: Prefix) -> int:
        return sum(held is prefix for held in self.holders)

    @invariant()
    def cache_shows_the_truth(self) -> None:
        self.cache.check_invariants()
        self.cache._pool.check_invariants()
        uids = {prefix.uid for prefix in self.counted()}
        assert len(self.cache) == len(self.resident)
        assert {f"key-{key}" for key in KEYS if f"key-{key}" in self.cache} == set(self.resident)
        assert self.cache.num_bytes == self.bytes_of(uids) <= self.max_bytes
        assert self.cache._pool.num_prefix_pages == self.pages_of(uids) <= self.prefix_pages
        assert self.cache._pool.ledger.num_used == self.pages_of(uids), "a page was lost"
        assert self.cache.num_users == sum(self.users(prefix) for prefix in self.resident.values())
        assert all(prefix.num_users == self.users(prefix) for prefix in (*self.resident.values(), *self.holders))
        assert evictions(self.metrics, "device") == self.num_evicted


TestDeviceTierSchedule = DeviceTierSchedule.TestCase
TestDeviceTierSchedule.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_prefix_in_use_or_pinned_stays_however_short_the_memory() -> None:
    cache = make_tier(3 * PAGE_BYTES)
    held = made(cache, "a", PAGE_SIZE)
    assert cache.acquire("key-a") is held
    cache.pin(frozenset({"key-b"}))
    for key in ("b", "c", "d"):
        made(cache, key, PAGE_SIZE)
    assert [key for key in "abcd" if f"key-{key}" in cache] == ["a", "b", "d"]
    assert held.is_alive


def test_nothing_is_evicted_for_a_prefix_that_would_still_not_fit() -> None:
    cache = make_tier(3 * PAGE_BYTES)
    made(cache, "a", PAGE_SIZE)
    assert cache.acquire("key-a") is not None
    made(cache, "b", PAGE_SIZE)
    assert not cache.make_room(3 * PAGE_SIZE)
    assert [key for key in "ab" if f"key-{key}" in cache] == ["a", "b"]
    assert cache.make_room(2 * PAGE_SIZE)
    assert [key for key in "ab" if f"key-{key}" in cache] == ["a"]


def test_least_recently_acquired_prefix_goes_first() -> None:
    cache = make_tier(2 * PAGE_BYTES)
    for key in ("a", "b"):
        made(cache, key, PAGE_SIZE)
    prefix = cache.acquire("key-a")
    assert prefix is not None
    cache.release(prefix)
    made(cache, "c", PAGE_SIZE)
    assert [key for key in "abc" if f"key-{key}" in cache] == ["a", "c"]


def test_prefix_released_once_too_often_is_an_error() -> None:
    cache = make_tier(PAGE_BYTES)
    prefix = made(cache, "a")
    assert cache.acquire("key-a") is prefix
    cache.release(prefix)
    with pytest.raises(RuntimeError, match="released more often"):
        cache.release(prefix)


def test_prefix_compiled_again_after_deletion_is_another_one() -> None:
    cache = make_tier(6 * PAGE_BYTES)
    old = made(cache, "a", PAGE_SIZE + 2)
    assert cache.acquire("key-a") is old
    cache.evict("key-a")
    new = made(cache, "a", PAGE_SIZE + 2)
    assert new.uid != old.uid
    assert new.pages.tolist() != old.pages.tolist()
    assert cache.num_bytes == 2 * (PAGE_SIZE + 2) * BYTES_PER_TOKEN, "the deleted prefix is still held by a row"
    cache.release(old)
    assert cache.num_bytes == (PAGE_SIZE + 2) * BYTES_PER_TOKEN
    assert cache._pool.num_prefix_pages == 1
    assert new.num_users == 0


def test_what_making_a_prefix_may_take_is_whole_pages() -> None:
    cache = make_tier(PAGE_BYTES)
    assert [cache.bytes_for(k) for k in (1, PAGE_SIZE, PAGE_SIZE + 1)] == [PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]


@pytest.mark.parametrize("damage", ["key", "dead", "bytes", "too many bytes", "pages"])
def test_invariants_notice_a_damaged_tier(damage: str) -> None:
    cache = make_tier(2 * PAGE_BYTES)
    prefix = made(cache, "a", PAGE_SIZE)
    cache.check_invariants()
    if damage == "key":
        prefix.key = "key-b"
    elif damage == "dead":
        prefix.is_alive = False
    elif damage == "bytes":
        cache.num_bytes -= 1
    elif damage == "too many bytes":
        cache.num_bytes = 2 * PAGE_BYTES + 1
    else:
        cache._pool.num_prefix_pages = 0
    with pytest.raises(RuntimeError):
        cache.check_invariants()


def soft_prompt(k: int) -> SoftPrompt:
    return SoftPrompt(kind="embeddings", values=np.full((k, 2), k, dtype=np.float32))


def test_host_tier_forgets_the_least_recently_used_and_counts_its_bytes() -> None:
    metrics = Metrics()
    host = HostCache(max_bytes=3 * 8, metrics=metrics)
    for key in ("a", "b", "c"):
        host.put(key, soft_prompt(1))
    assert host.get("a") is not None
    host.put("d", soft_prompt(1))
    assert [key for key in ("a", "b", "c", "d") if key in host] == ["a", "c", "d"]
    assert host.num_bytes == 24
    assert evictions(metrics, "host") == 1
    host.put("a", soft_prompt(2))
    assert host.num_bytes <= 24
    host.discard("a")
    host.discard("a")
    assert host.get("a") is None
    assert host.num_bytes == sum(8 for key in ("c", "d") if key in host)


def test_host_tier_holds_one_prompt_that_is_larger_than_itself() -> None:
    host = HostCache(max_bytes=8, metrics=Metrics())
    host.put("small", soft_prompt(1))
    host.put("large", soft_prompt(9))
    assert "small" not in host
    assert host.get("large") is not None


class LoaderBench:
    """A loader with its thread; `wait` sleeps until it has called `wake` as often as asked."""

    def __init__(self, answers: dict[str, SoftPrompt | Exception]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.woken = threading.Semaphore(0)
        self.loader = PromptLoader(self.load, self.woken.release)

    def load(self, ref: PromptRef) -> SoftPrompt:
        assert self.gate.wait(30)
        self.asked.append(ref.prefix_key)
        answer = self.answers[ref.prefix_key]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, times: int = 1) -> list[LoadedPrompt]:
        for _ in range(times):
            assert self.woken.acquire(timeout=30)
        return self.loader.poll()

    def __enter__(self) -> "LoaderBench":
        self.loader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.gate.set()
        self.loader.stop()


def test_loader_brings_what_was_asked_for_and_wakes_the_engine() -> None:
    prompt = soft_prompt(1)
    with LoaderBench({"key-a": prompt}) as bench:
        bench.loader.request(make_ref("a"))
        (loaded,) = bench.wait()
        assert (loaded.ref.prefix_key, loaded.prompt, loaded.error, loaded.for_audit) == ("key-a", prompt, None, False)
        assert bench.loader.poll() == []


def test_prompt_on_its_way_is_not_asked_for_twice_but_again_after_it_has_come() -> None:
    with LoaderBench({"key-a": soft_prompt(1)}) as bench:
        bench.gate.clear()
        for _ in range(3):
            bench.loader.request(make_ref("a"))
        bench.gate.set()
        assert len(bench.wait()) == 1
        bench.loader.request(make_ref("a"))
        assert len(bench.wait()) == 1
        assert bench.asked == ["key-a", "key-a"]


def test_audit_reads_the_prompt_itself_while_a_row_waits_for_it() -> None:
    with LoaderBench({"key-a": soft_prompt(1)}) as bench:
        bench.gate.clear()
        bench.loader.request(make_ref("a"))
        bench.loader.request_for_audit(make_ref("a"))
        bench.gate.set()
        loaded = bench.wait(times=2)
        assert [item.for_audit for item in loaded] == [False, True]
        assert len(bench.asked) == 2


def test_typed_error_is_passed_on_and_any_other_becomes_unavailable() -> None:
    corrupt = PromptCorruptError("the digest is not that of the file")
    with LoaderBench({"key-a": corrupt, "key-b": OSError("disk is gone"), "key-c": soft_prompt(1)}) as bench:
        for key in ("a", "b", "c"):
            bench.loader.request(make_ref(key))
        first, second, third = bench.wait(times=3)
        assert first.error is corrupt
        assert isinstance(second.error, UnavailableError)
        assert "task-b@1" in str(second.error)
        assert "disk is gone" in str(second.error)
        assert third.prompt is not None, "the loader lives on after failures"


def test_loader_that_was_never_started_can_be_stopped() -> None:
    PromptLoader(lambda ref: soft_prompt(1), lambda: None).stop()
