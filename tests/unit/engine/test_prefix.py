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
from server.engine.kv import KeysValues
from server.engine.prefix import HostCache, LoadedPrompt, Prefix, PrefixCache, PromptLoader
from server.engine.request import PromptRef
from server.errors import PromptCorruptError, UnavailableError
from server.metrics import Metrics
from tests.unit.engine.prompts import make_ref

KEYS = ("a", "b", "c", "d", "e")
BYTES_PER_TOKEN = 2 * 4


def make_tensors(k: int) -> KeysValues:
    """One layer, one head, one number: 8 bytes a token."""
    return KeysValues((torch.zeros(1, k, 1),), (torch.zeros(1, k, 1),))


def evictions(metrics: Metrics, tier: str) -> float:
    return metrics.registry.get_sample_value("promptmux_prompt_cache_evictions_total", {"tier": tier}) or 0.0


class DeviceTierSchedule(RuleBasedStateMachine):
    """Rows acquire and release, prompts arrive, are pinned and deleted; `resident` is the truth, in order of use."""

    @initialize(max_tokens=st.integers(0, 12))
    def start(self, max_tokens: int) -> None:
        self.max_bytes = max_tokens * BYTES_PER_TOKEN
        self.metrics = Metrics()
        self.cache = PrefixCache(self.max_bytes, self.metrics)
        self.resident: OrderedDict[str, Prefix] = OrderedDict()
        self.holders: list[Prefix] = []
        self.pinned: frozenset[str] = frozenset()
        self.uids: set[int] = set()
        self.num_evicted = 0

    @rule(key=st.sampled_from(KEYS), k=st.integers(1, 5))
    def insert(self, key: str, k: int) -> None:
        ref = make_ref(key, k=k)
        if ref.prefix_key in self.resident:
            with pytest.raises(RuntimeError, match="compiled twice"):
                self.cache.insert(ref, make_tensors(k))
            return
        prefix = self.cache.insert(ref, make_tensors(k))
        assert prefix.uid not in self.uids, "a uid was given twice"
        assert (prefix.key, prefix.digest, prefix.num_users) == (ref.prefix_key, ref.digest, 0)
        self.uids.add(prefix.uid)
        self.resident[ref.prefix_key] = prefix
        self.expect_evictions(list(self.resident)[:-1])

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
        prefix = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.cache.release(prefix)
        if not self.users(prefix):
            self.expect_evictions(list(self.resident))

    @rule(keys=st.frozensets(st.sampled_from(KEYS), max_size=2))
    def pin(self, keys: frozenset[str]) -> None:
        self.pinned = frozenset(f"key-{key}" for key in keys)
        self.cache.pin(self.pinned)

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        self.cache.evict(f"key-{key}")
        prefix = self.resident.pop(f"key-{key}", None)
        assert prefix is None or not prefix.is_alive

    def expect_evictions(self, candidates: list[str]) -> None:
        for key in candidates:
            if self.expected_bytes() <= self.max_bytes:
                break
            if key not in self.pinned and not self.users(self.resident[key]):
                assert not self.resident.pop(key).is_alive
                self.num_evicted += 1

    def users(self, prefix: Prefix) -> int:
        return sum(held is prefix for held in self.holders)

    def expected_bytes(self) -> int:
        """Of the resident ones, and of deleted ones that rows still hold."""
        counted = {prefix.uid: prefix for prefix in (*self.resident.values(), *self.holders)}
        return sum(prefix.tensors.num_bytes for prefix in counted.values())

    @invariant()
    def cache_shows_the_truth(self) -> None:
        self.cache.check_invariants()
        assert len(self.cache) == len(self.resident)
        assert {f"key-{key}" for key in KEYS if f"key-{key}" in self.cache} == set(self.resident)
        assert self.cache.num_bytes == self.expected_bytes()
        assert self.cache.num_users == sum(self.users(prefix) for prefix in self.resident.values())
        assert all(prefix.num_users == self.users(prefix) for prefix in (*self.resident.values(), *self.holders))
        assert evictions(self.metrics, "device") == self.num_evicted


TestDeviceTierSchedule = DeviceTierSchedule.TestCase
TestDeviceTierSchedule.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_prefix_in_use_or_pinned_stays_however_short_the_memory() -> None:
    cache = PrefixCache(max_bytes=0, metrics=Metrics())
    held = cache.insert(make_ref("a"), make_tensors(1))
    assert cache.acquire("key-a") is held
    cache.pin(frozenset({"key-b"}))
    for key in ("b", "c", "d"):
        cache.insert(make_ref(key), make_tensors(1))
    assert [key for key in "abcd" if f"key-{key}" in cache] == ["a", "b", "d"]
    assert held.is_alive


def test_least_recently_acquired_prefix_goes_first() -> None:
    cache = PrefixCache(max_bytes=2 * BYTES_PER_TOKEN, metrics=Metrics())
    for key in ("a", "b"):
        cache.insert(make_ref(key), make_tensors(1))
    prefix = cache.acquire("key-a")
    assert prefix is not None
    cache.release(prefix)
    cache.insert(make_ref("c"), make_tensors(1))
    assert [key for key in "abc" if f"key-{key}" in cache] == ["a", "c"]


def test_prefix_released_once_too_often_is_an_error() -> None:
    cache = PrefixCache(100, Metrics())
    prefix = cache.insert(make_ref("a"), make_tensors(1))
    assert cache.acquire("key-a") is prefix
    cache.release(prefix)
    with pytest.raises(RuntimeError, match="released more often"):
        cache.release(prefix)


def test_prefix_compiled_again_after_deletion_is_another_one() -> None:
    cache = PrefixCache(100, Metrics())
    old = cache.insert(make_ref("a"), make_tensors(2))
    assert cache.acquire("key-a") is old
    cache.evict("key-a")
    new = cache.insert(make_ref("a"), make_tensors(2))
    assert new.uid != old.uid
    assert cache.num_bytes == 4 * BYTES_PER_TOKEN, "the deleted prefix is still held by a row"
    cache.release(old)
    assert cache.num_bytes == 2 * BYTES_PER_TOKEN
    assert new.num_users == 0


@pytest.mark.parametrize("damage", ["key", "dead", "bytes"])
def test_invariants_notice_a_damaged_tier(damage: str) -> None:
    cache = PrefixCache(100, Metrics())
    prefix = cache.insert(make_ref("a"), make_tensors(1))
    cache.check_invariants()
    if damage == "key":
        prefix.key = "key-b"
    elif damage == "dead":
        prefix.is_alive = False
    else:
        cache.num_bytes -= 1
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
