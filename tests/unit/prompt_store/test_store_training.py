"""Files of examples and jobs in the store, in both kinds of store: whose they are, and who has a job in hand."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prompt_store import training_records
from prompt_store.errors import QuotaExceeded, TooManyJobs, TrainingNotFound, VersionConflict
from prompt_store.store import PromptStore
from prompt_store.training_values import TrainingEvent, TrainingJob

DATA = b'{"prompt": "a", "completion": "b"}\n'
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def add_file(store: PromptStore, tenant: str = "a", data: bytes = DATA, **fields: Any) -> str:
    return store.add_training_file(tenant, data, filename="x.jsonl", num_examples=1, **fields).id


def add_job(store: PromptStore, tenant: str = "a", task: str = "t", **fields: Any) -> TrainingJob:
    file = fields.pop("training_file", None) or add_file(store, tenant)
    return store.add_training_job(tenant, task, training_file=file, validation_file=None, spec={"k": 1}, **fields)


def claim(store: PromptStore, runner: str = "r", *held: str, stale_before: datetime = LONG_AGO) -> TrainingJob | None:
    return store.claim_training_job(runner, held=held, stale_before=stale_before)


def event(message: str) -> TrainingEvent:
    return TrainingEvent(level="info", type="metrics", message=message, at=datetime.now(UTC), data={"step": 1})


def test_a_file_is_its_tenants_alone(store: PromptStore) -> None:
    file_id = add_file(store)

    file = store.get_training_file("a", file_id)
    assert store.read_training_file(file) == DATA
    assert store.list_training_files("b") == []
    for ask in (store.get_training_file, store.delete_training_file):
        with pytest.raises(TrainingNotFound) as foreign:
            ask("b", file_id)  # type: ignore[operator]
        with pytest.raises(TrainingNotFound) as unknown:
            ask("b", "file-unknown")  # type: ignore[operator]
        assert foreign.value.message == unknown.value.message
    with pytest.raises(TrainingNotFound):
        add_job(store, "b", training_file=file_id)


def test_bytes_that_two_files_share_go_with_the_last(store: PromptStore) -> None:
    first, second = add_file(store), add_file(store, "b")
    store.check_invariants()

    store.delete_training_file("a", first)
    assert store.read_training_file(store.get_training_file("b", second)) == DATA
    store.delete_training_file("b", second)

    store.check_invariants()
    assert store.list_training_files("a") == []


def test_a_page_after_a_file_that_is_not_there_names_the_field(store: PromptStore) -> None:
    with pytest.raises(TrainingNotFound) as refused:
        store.list_training_files("a", after="file-x")

    assert refused.value.param == "after"


def test_files_are_listed_page_by_page_in_either_order(store: PromptStore) -> None:
    ids = [add_file(store, data=DATA * n) for n in range(1, 6)]

    pages = [file.id for file in store.list_training_files("a", limit=2)]
    pages += [file.id for file in store.list_training_files("a", limit=9, after=pages[-1])]

    assert pages == ids[::-1]
    assert [file.id for file in store.list_training_files("a", newest_first=False)] == ids
    with pytest.raises(TrainingNotFound):
        store.list_training_files("b", after=ids[0])


def test_a_tenant_may_store_so_many_bytes(store: PromptStore) -> None:
    add_file(store, max_tenant_bytes=len(DATA) * 2)
    add_file(store, data=DATA[::-1], max_tenant_bytes=len(DATA) * 2)

    with pytest.raises(QuotaExceeded):
        add_file(store, data=b"x", max_tenant_bytes=len(DATA) * 2)
    add_file(store, "b", data=b"x", max_tenant_bytes=len(DATA) * 2)

    store.check_invariants()
    assert len(store.list_training_files("a")) == 2


def test_a_tenant_may_store_so_many_files_however_small(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_records, "MAX_TENANT_FILES", 2)
    files = [add_file(store), add_file(store)]
    add_file(store, "b")

    with pytest.raises(QuotaExceeded):
        add_file(store)

    store.delete_training_file("a", files[0])
    add_file(store)


def test_a_tenant_may_have_so_many_jobs_that_have_not_ended(store: PromptStore) -> None:
    first = add_job(store, max_unfinished=2)
    add_job(store, max_unfinished=2)

    with pytest.raises(TooManyJobs):
        add_job(store, max_unfinished=2)
    add_job(store, "b", max_unfinished=2)
    store.cancel_training_job("a", first.id)
    add_job(store, max_unfinished=2)


def test_a_job_is_its_tenants_alone(store: PromptStore) -> None:
    job = add_job(store)

    assert store.get_training_job("a", job.id) == job
    assert store.list_training_jobs("b") == []
    for ask in (store.get_training_job, store.list_training_events, store.cancel_training_job):
        with pytest.raises(TrainingNotFound):
            ask("b", job.id)  # type: ignore[operator]
    assert store.get_training_job("a", job.id).status == "queued"


def test_a_file_that_a_job_needs_stays_until_the_job_has_ended(store: PromptStore) -> None:
    job = add_job(store)

    with pytest.raises(VersionConflict):
        store.delete_training_file("a", job.training_file)
    store.cancel_training_job("a", job.id)
    store.delete_training_file("a", job.training_file)

    assert store.get_training_job("a", job.id).data_digest == job.data_digest


def test_each_job_is_one_runners(store: PromptStore) -> None:
    ids = {add_job(store).id, add_job(store).id}

    first, second, third = claim(store, "r"), claim(store, "other"), claim(store, "r")

    assert first is not None
    assert second is not None
    assert {first.id, second.id} == ids
    # Asked again with nothing in hand: it was killed, and takes up what it had.
    assert third is not None
    assert third.id == first.id
    assert third.num_starts == 2
    assert claim(store, "r", first.id) is None


def test_tenants_take_turns(store: PromptStore) -> None:
    many = [add_job(store, "a") for _ in range(3)]
    few = add_job(store, "b")

    held: list[str] = []
    while (job := claim(store, "r", *held)) is not None:
        held.append(job.id)

    assert held == [many[0].id, few.id, many[1].id, many[2].id]


def test_a_job_whose_runner_is_silent_is_given_to_another(store: PromptStore) -> None:
    job = add_job(store)
    claim(store, "dead")

    assert claim(store, "r") is None
    found = claim(store, "r", stale_before=datetime.now(UTC) + timedelta(seconds=1))

    assert found is not None
    assert found.id == job.id
    assert not store.report_training(job.id, "dead", [event("too late")])
    assert not store.finish_training_job(job.id, "dead", status="failed", error={"code": "x"})
    assert store.get_training_job("a", job.id).status == "running"
    assert store.list_training_events("a", job.id)[1] == []


def test_a_cancelled_job_takes_nothing_more_from_its_runner(store: PromptStore) -> None:
    job = add_job(store)
    claim(store)
    assert store.report_training(job.id, "r", [event("step")])

    assert store.cancel_training_job("a", job.id).status == "cancelled"

    assert not store.report_training(job.id, "r", [event("after")])
    assert not store.finish_training_job(job.id, "r", status="succeeded", result={})
    assert claim(store, "r") is None
    assert store.cancel_training_job("a", job.id).status == "cancelled"
    messages = [told.message for told in store.list_training_events("a", job.id)[1]]
    assert messages == ["The job was cancelled.", "step"]


def test_an_ended_job_cannot_be_cancelled(store: PromptStore) -> None:
    job = add_job(store)
    claim(store)
    assert store.finish_training_job(job.id, "r", status="succeeded", result={"version": 1}, events=[event("done")])

    with pytest.raises(VersionConflict):
        store.cancel_training_job("a", job.id)
    ended = store.get_training_job("a", job.id)
    assert (ended.status, ended.result, ended.finished_at is not None) == ("succeeded", {"version": 1}, True)


def test_a_trained_job_is_cancelled_no_more_for_its_prompt_may_be_stored(store: PromptStore) -> None:
    job = add_job(store)
    claim(store)
    assert store.report_training(job.id, "r", is_trained=True)

    with pytest.raises(VersionConflict, match="is trained"):
        store.cancel_training_job("a", job.id)

    assert store.get_training_job("a", job.id).status == "running"
    # Nor after a server that was killed meanwhile has it again.
    assert claim(store) is not None
    with pytest.raises(VersionConflict):
        store.cancel_training_job("a", job.id)
    # Another server trains it anew.
    assert claim(store, "other", stale_before=datetime.now(UTC) + timedelta(seconds=1)) is not None
    assert store.cancel_training_job("a", job.id).status == "cancelled"


def test_a_cancelled_job_cannot_say_that_it_is_trained(store: PromptStore) -> None:
    job = add_job(store)
    claim(store)
    store.cancel_training_job("a", job.id)

    assert not store.report_training(job.id, "r", is_trained=True)


def test_unfinished_jobs_are_those_of_all_tenants(store: PromptStore) -> None:
    jobs = [add_job(store, tenant) for tenant in ("a", "b", "b")]
    claim(store)
    store.cancel_training_job("b", jobs[2].id)

    assert store.unfinished_training_jobs() == {jobs[0].id, jobs[1].id}


def test_a_job_that_is_given_back_was_not_lost(store: PromptStore) -> None:
    job = add_job(store)
    for _ in range(3):
        claimed = claim(store)
        assert claimed is not None
        assert claimed.num_starts == 1
        assert store.finish_training_job(job.id, "r", status="queued")


def test_events_are_listed_page_by_page_newest_first(store: PromptStore) -> None:
    job = add_job(store)
    claim(store)
    store.report_training(job.id, "r", [event(f"step {n}") for n in range(5)])

    _, first = store.list_training_events("a", job.id, limit=2)
    _, rest = store.list_training_events("a", job.id, limit=9, after=first[-1].serial)

    assert [told.message for told in first + rest] == [f"step {n}" for n in range(4, -1, -1)]
    assert first[0].data == {"step": 1}


def test_ended_jobs_are_forgotten_with_their_events_after_their_time(store: PromptStore) -> None:
    ended, waiting = add_job(store), add_job(store)
    store.cancel_training_job("a", ended.id)

    assert store.forget_ended_training_jobs(before=LONG_AGO) == 0
    assert store.forget_ended_training_jobs(before=datetime.now(UTC) + timedelta(seconds=1)) == 1

    assert [job.id for job in store.list_training_jobs("a")] == [waiting.id]
    assert store.count_training_jobs() == {"queued": 1}


def test_files_and_jobs_outlive_the_process(root: Path) -> None:
    with PromptStore.open(root) as store:
        job = add_job(store)
        claim(store)

    with PromptStore.open(root) as store:
        assert store.read_training_file(store.get_training_file("a", job.training_file)) == DATA
        found = claim(store)
        assert found is not None
        assert found.id == job.id
        store.check_invariants()
