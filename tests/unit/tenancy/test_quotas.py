"""Quotas over a real store and a clock of the test's own."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.manifest import Quota
from prompt_store.store import PromptStore
from server.errors import QuotaExceededError, RateLimitExceededError
from server.tenancy.quotas import CACHE_TTL_S, MAX_TENANTS, Limits, QuotaKeeper, Reservation, _duration


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with PromptStore.open(tmp_path / "data") as opened:
        yield opened


def make_keeper(store: PromptStore, clock: Clock, **defaults: int) -> QuotaKeeper:
    keeper = QuotaKeeper(store, Limits(**defaults), clock=clock)
    keeper.refresh("acme")
    return keeper


def reserve(keeper: QuotaKeeper, *, prompt: int = 10, new: int = 10, rows: int = 1) -> Reservation:
    return keeper.reserve("acme", num_prompt_tokens=prompt, num_new_tokens=new, num_rows=rows)


def test_without_limits_everything_passes_and_rows_are_counted(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock())
    held = reserve(keeper, prompt=10**9, rows=1000)
    assert keeper.use_of("acme").rows == 1000
    assert held.headers == {}
    keeper.settle(held, num_new_tokens=0)
    assert keeper.use_of("acme").rows == 0


def test_requests_of_a_minute_run_out_and_come_back(store: PromptStore) -> None:
    clock = Clock()
    keeper = make_keeper(store, clock, requests_per_minute=6)
    for _ in range(6):
        reserve(keeper)
    with pytest.raises(RateLimitExceededError) as refused:
        reserve(keeper)
    assert refused.value.headers()["Retry-After"] == "10"
    assert refused.value.param == "requests_per_minute"
    clock.now_s += 9.9
    with pytest.raises(RateLimitExceededError):
        reserve(keeper)
    clock.now_s += 0.2
    reserve(keeper)


def test_tokens_are_reserved_and_those_that_were_not_made_given_back(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), tokens_per_minute=100)
    held = reserve(keeper, prompt=20, new=80)
    with pytest.raises(RateLimitExceededError):
        reserve(keeper, prompt=1, new=0)
    keeper.settle(held, num_new_tokens=5)
    assert keeper.use_of("acme").tokens == 25
    keeper.settle(held, num_new_tokens=5)
    assert keeper.use_of("acme").tokens == 25, "a reservation is settled once"
    reserve(keeper, prompt=75, new=0)


def test_request_that_never_ran_costs_nothing(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), requests_per_minute=1, tokens_per_minute=20)
    keeper.cancel(reserve(keeper))
    assert keeper.use_of("acme") == type(keeper.use_of("acme"))(0, 0, 0)
    reserve(keeper)


def test_refused_request_is_charged_nothing_of_what_it_might_have_had(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), requests_per_minute=10, tokens_per_minute=50, max_running_rows=4)
    reserve(keeper, prompt=20, new=20)
    with pytest.raises(RateLimitExceededError):
        reserve(keeper, prompt=20, new=20)
    with pytest.raises(QuotaExceededError):
        reserve(keeper, rows=4)
    assert keeper.use_of("acme") == type(keeper.use_of("acme"))(1, 40, 1)


def test_request_of_more_tokens_than_a_minute_ever_has_is_told_so_at_the_longest(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), tokens_per_minute=50)
    with pytest.raises(QuotaExceededError) as refused:
        reserve(keeper, prompt=51, new=0)
    assert not isinstance(refused.value, RateLimitExceededError)
    assert refused.value.headers()["Retry-After"] == "30"
    assert refused.value.headers()["x-should-retry"] == "false"


@pytest.mark.parametrize(("rows", "advice"), [(2, None), (3, "false")])
def test_clients_are_told_not_to_try_again_only_where_no_wait_helps(
    store: PromptStore, rows: int, advice: str | None
) -> None:
    keeper = make_keeper(store, Clock(), max_running_rows=2)
    reserve(keeper, rows=1)
    with pytest.raises(QuotaExceededError) as refused:
        reserve(keeper, rows=rows)
    assert refused.value.headers().get("x-should-retry") == advice


@pytest.mark.parametrize(("limit", "expected"), [(1, "30"), (6, "10"), (600, "1")])
def test_retry_after_is_from_1_to_30_seconds(store: PromptStore, limit: int, expected: str) -> None:
    keeper = make_keeper(store, Clock(), requests_per_minute=limit)
    for _ in range(limit):
        reserve(keeper)
    with pytest.raises(RateLimitExceededError) as refused:
        reserve(keeper)
    assert refused.value.headers()["Retry-After"] == expected


def test_headers_are_those_that_clients_of_openai_read(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), requests_per_minute=60, tokens_per_minute=600)
    assert reserve(keeper, prompt=10, new=20).headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "570",
        "x-ratelimit-reset-tokens": "3s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.25, "250ms"), (7, "7s"), (7.5, "7.5s"), (72, "1m12s"), (float("inf"), "60m0s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_own_limit_goes_before_the_default_and_an_open_one_is_the_default(store: PromptStore) -> None:
    store.set_quota(Quota(tenant="acme", max_running_rows=7))
    keeper = make_keeper(store, Clock(), max_running_rows=3, max_prompts=5)
    assert keeper.refresh("acme") == Limits(max_running_rows=7, max_prompts=5)
    assert keeper.refresh("other") == Limits(max_running_rows=3, max_prompts=5)
    assert keeper.quota_of("acme").max_prompts == 5


def test_changed_quota_is_looked_at_after_a_second_and_new_defaults_at_once(store: PromptStore) -> None:
    clock = Clock()
    keeper = make_keeper(store, clock)
    clock.now_s += CACHE_TTL_S * 0.99
    assert keeper.is_fresh("acme")
    clock.now_s += CACHE_TTL_S * 0.02
    assert not keeper.is_fresh("acme")
    keeper.refresh("acme")
    keeper.set_defaults(Limits(max_running_rows=1))
    assert not keeper.is_fresh("acme")
    keeper.refresh("acme")
    with pytest.raises(QuotaExceededError):
        reserve(keeper, rows=2)


def test_idle_tenants_make_room_for_others(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock())
    held = reserve(keeper)
    for number in range(MAX_TENANTS + 5):
        keeper.reserve(f"t{number}", num_prompt_tokens=0, num_new_tokens=0, num_rows=0)
    assert len(keeper.tenants()) == MAX_TENANTS
    assert keeper.use_of("acme").rows == 1, "one with rows running is not forgotten"
    keeper.settle(held, num_new_tokens=0)


def test_many_threads_take_no_more_than_there_is(store: PromptStore) -> None:
    keeper = make_keeper(store, Clock(), requests_per_minute=50)
    passed: list[int] = []

    def work() -> None:
        for _ in range(20):
            try:
                reserve(keeper)
            except RateLimitExceededError:
                continue
            passed.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 50


def test_the_tenant_unseen_for_longest_makes_room(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tenancy.quotas.MAX_TENANTS", 2)
    keeper = QuotaKeeper(store, Limits())
    for tenant in ("first", "second", "first", "third"):
        keeper.refresh(tenant)

    assert keeper.tenants() == ["first", "third"]
