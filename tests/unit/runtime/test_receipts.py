"""The writer of receipts: groups, a full queue, a failing disk, the end."""

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from prompt_store.errors import StorageFailed
from prompt_store.manifest import Receipt
from prompt_store.store import PromptStore
from server.engine.request import FINISH_LENGTH, PromptRef, RowOutput, SamplingParams
from server.metrics import Metrics
from server.runtime.generation import GenerationSpec, make_generation
from server.runtime.meter import RequestMeter
from server.runtime.receipts import ReceiptWriter, RequestOrigin, make_receipts
from server.runtime.stats import TaskStatsTable

TIMEOUT_S = 10.0


def make_receipt(request_id: str) -> Receipt:
    return Receipt(
        at=datetime.now(UTC),
        request_id=request_id,
        tenant="t",
        key_id=None,
        endpoint="/v1/completions",
        owner=None,
        task=None,
        version=None,
        digest=None,
        num_rows=1,
        prompt_tokens=1,
        completion_tokens=1,
        outcome="stop",
    )


class HeldStore:
    """A store whose disk answers when the test says so; it fails the first `num_failures` times."""

    def __init__(self, num_failures: int = 0) -> None:
        self.batches: list[list[str]] = []
        self.began, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.num_failures = num_failures

    def append_receipts(self, receipts: Sequence[Receipt], *, max_rows: int) -> None:
        self.began.release()
        assert self.may_end.acquire(timeout=TIMEOUT_S)
        self.batches.append([receipt.request_id for receipt in receipts])
        if len(self.batches) <= self.num_failures:
            raise StorageFailed("no disk")


def make_writer(store: HeldStore, metrics: Metrics, *, max_queued: int = 100, max_rows: int = 10) -> ReceiptWriter:
    return ReceiptWriter(cast(PromptStore, store), metrics, max_rows=max_rows, max_queued=max_queued, linger_s=0.0)


def count(metrics: Metrics, result: str) -> float:
    return metrics.registry.get_sample_value("promptmux_receipts_total", {"result": result}) or 0.0


def test_what_comes_while_the_disk_is_busy_is_one_group() -> None:
    store, metrics = HeldStore(), Metrics()
    writer = make_writer(store, metrics)
    writer.start()
    writer.put([make_receipt("first")])
    assert store.began.acquire(timeout=TIMEOUT_S)
    for name in "abc":
        writer.put([make_receipt(name)])
    store.may_end.release(10)
    writer.stop(TIMEOUT_S)

    assert store.batches == [["first"], ["a", "b", "c"]]
    assert count(metrics, "written") == 4


def test_full_queue_drops_and_counts_and_does_not_wait() -> None:
    store, metrics = HeldStore(), Metrics()
    writer = make_writer(store, metrics, max_queued=2)
    writer.start()
    writer.put([make_receipt("first")])
    assert store.began.acquire(timeout=TIMEOUT_S)
    writer.put([make_receipt(name) for name in "abc"])
    writer.put([make_receipt("d")])
    store.may_end.release(10)
    writer.stop(TIMEOUT_S)

    assert store.batches == [["first"], ["a", "b"]]
    assert (count(metrics, "written"), count(metrics, "dropped")) == (3, 2)


def test_failing_disk_is_counted_and_the_next_group_is_written() -> None:
    store, metrics = HeldStore(num_failures=1), Metrics()
    writer = make_writer(store, metrics)
    writer.start()
    writer.put([make_receipt("lost")])
    assert store.began.acquire(timeout=TIMEOUT_S)
    writer.put([make_receipt("kept")])
    store.may_end.release(10)
    writer.stop(TIMEOUT_S)

    assert store.batches == [["lost"], ["kept"]]
    assert (count(metrics, "failed"), count(metrics, "written")) == (1, 1)


def test_stop_writes_what_is_queued_and_later_ones_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics()
    with PromptStore.open(tmp_path) as store:
        writer = ReceiptWriter(store, metrics, max_rows=10_000, linger_s=TIMEOUT_S)
        writer.start()
        for number in range(2500):
            writer.put([make_receipt(str(number))])
        writer.stop(TIMEOUT_S)
        writer.stop(TIMEOUT_S)
        writer.put([make_receipt("late")])
        assert [receipt.request_id for receipt in store.iter_receipts()] == [str(number) for number in range(2500)]
    assert (count(metrics, "written"), count(metrics, "dropped")) == (2500, 1)


def test_none_are_written_when_none_are_to_be_kept() -> None:
    store, metrics = HeldStore(), Metrics()
    writer = make_writer(store, metrics, max_rows=0)
    writer.start()
    writer.put([make_receipt("a")])
    writer.stop(TIMEOUT_S)
    assert store.batches == []
    assert count(metrics, "dropped") == 0


def test_request_leaves_one_receipt_for_each_prompt_that_answered() -> None:
    ref = PromptRef(
        tenant="shared", task="a", version=4, digest="d" * 64, prefix_key="k", kind="embeddings", num_virtual_tokens=4
    )
    spec = GenerationSpec(
        prompts=((1, 2), (3,), (4,)),
        references=("a", "bare", "a"),
        n=2,
        sampling=SamplingParams(max_tokens=2, temperature=0),
    )
    generation = make_generation(
        spec,
        generation_id="g",
        tenant="t",
        token_ids=((1, 2), (3,), (4,)),
        prompts={"a": ref, "bare": None},
        max_model_len=64,
    )
    meter = RequestMeter(generation, arrived_at_s=0.0)
    for row in generation.rows[:-1]:
        meter.observe(RowOutput(row_id=row.row_id, token_ids=(7, 8), finish_reason=FINISH_LENGTH))
    with pytest.raises(AssertionError):
        meter.use_by_prompt()
    meter.finish(TaskStatsTable())

    found = make_receipts(meter, RequestOrigin(request_id="r", key_id="key_1", endpoint="/v1/completions"))

    by_task = {receipt.task: receipt for receipt in found}
    assert len(found) == 2
    prompted, bare = by_task["a"], by_task[None]
    assert (prompted.owner, prompted.version, prompted.digest, prompted.num_rows) == ("shared", 4, "d" * 64, 4)
    assert (prompted.prompt_tokens, prompted.completion_tokens, prompted.outcome) == (3, 6, "cancelled,length")
    assert (bare.owner, bare.version, bare.digest, bare.outcome) == (None, None, None, "length")
    assert {(receipt.tenant, receipt.request_id, receipt.key_id) for receipt in found} == {("t", "r", "key_1")}
