"""Key lookups, their cache, and the rule for servers without keys, over a real store and a clock of the test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.store import PromptStore
from server.errors import AuthenticationError
from server.tenancy.keys import CACHE_TTL_S, LOCAL_CALLER, MAX_CACHED_KEYS, Caller, KeyRing


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with PromptStore.open(tmp_path / "data") as opened:
        yield opened


def test_without_keys_everyone_is_the_default_tenant_with_all_scopes(store: PromptStore) -> None:
    ring = KeyRing(store)

    assert ring.check_cached(None) is None
    assert ring.check(None) == LOCAL_CALLER
    assert ring.check("Bearer whatever") == LOCAL_CALLER
    assert ring.check_cached(None) == LOCAL_CALLER
    assert ring.is_keyless
    assert LOCAL_CALLER.tenant == "default"


def test_key_is_looked_up_once_a_second(store: PromptStore) -> None:
    key, secret = store.create_key("acme", ["infer"])
    clock = Clock()
    ring = KeyRing(store, clock=clock)
    header = f"Bearer {secret}"

    assert ring.check_cached(header) is None
    assert ring.check(header) == Caller("acme", frozenset({"infer"}), key.id)
    store.revoke_key(key.id)
    clock.now_s += CACHE_TTL_S * 0.99
    assert ring.check_cached(header) is not None
    clock.now_s += CACHE_TTL_S * 0.02
    assert ring.check_cached(header) is None
    with pytest.raises(AuthenticationError):
        ring.check(header)


def test_first_key_ends_free_access_for_good(store: PromptStore) -> None:
    clock = Clock()
    ring = KeyRing(store, clock=clock)
    assert ring.check(None) == LOCAL_CALLER

    key, secret = store.create_key("acme", ["admin"])
    clock.now_s += CACHE_TTL_S * 1.01
    assert ring.check_cached(None) is None
    with pytest.raises(AuthenticationError):
        ring.check(None)
    assert ring.check(f"Bearer {secret}").tenant == "acme"
    store.revoke_key(key.id)
    clock.now_s += CACHE_TTL_S * 1.01
    with pytest.raises(AuthenticationError):
        ring.check(None)
    assert not ring.is_keyless


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic abc", "Bearer pm_wrong", "Bearer \ud800"])
def test_anything_but_a_known_key_is_refused(store: PromptStore, header: str | None) -> None:
    store.create_key("acme", ["infer"])

    with pytest.raises(AuthenticationError):
        KeyRing(store).check(header)


def test_scheme_is_case_insensitive(store: PromptStore) -> None:
    _, secret = store.create_key("acme", ["infer"])

    assert KeyRing(store).check(f"bEARER {secret}").tenant == "acme"


def test_cache_is_bounded_and_holds_no_secret(store: PromptStore) -> None:
    _, secret = store.create_key("acme", ["infer"])
    ring = KeyRing(store)
    ring.check(f"Bearer {secret}")
    for number in range(MAX_CACHED_KEYS + 10):
        ring._known[number.to_bytes(4, "big")] = (0.0, None)
    with pytest.raises(AuthenticationError):
        ring.check("Bearer pm_wrong")

    assert len(ring._known) == MAX_CACHED_KEYS
    assert secret not in str(ring.__dict__)


def test_admin_includes_the_other_scopes() -> None:
    assert Caller("t", frozenset({"admin"})).can("write")
    assert not Caller("t", frozenset({"write"})).can("infer")
    assert not Caller("t", frozenset({"write", "infer"})).can("admin")


def test_look_up_that_a_revocation_overtakes_is_not_remembered(store: PromptStore) -> None:
    key, secret = store.create_key("acme", ["infer"])
    ring = KeyRing(store)
    verify = store.verify_key

    def revoked_meanwhile(secret: str) -> object:
        found = verify(secret)
        store.revoke_key(key.id)
        ring.forget(key.id)
        return found

    store.verify_key = revoked_meanwhile  # type: ignore[method-assign, assignment]
    assert ring.check(f"Bearer {secret}").key_id == key.id

    assert ring.check_cached(f"Bearer {secret}") is None
    store.verify_key = verify  # type: ignore[method-assign]
    with pytest.raises(AuthenticationError):
        ring.check(f"Bearer {secret}")
