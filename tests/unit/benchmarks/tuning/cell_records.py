"""Records of cells that nobody made."""

from benchmarks.tuning.cells import Cell
from benchmarks.tuning.ledger import DataFacts, Group, Latency, Record, Scores, Training

MACHINE = {
    "cpu": "a CPU", "gpu": None, "cores": 2, "torch_threads": 2, "torch": "2", "transformers": "5", "peft": "0",
    "commit": "abc",
}  # fmt: skip


def make_record(cell: Cell, exact_match: float = 0.5, *, label_accuracy: float | None = None) -> Record:
    is_trained = cell.method not in ("none", "few-shot-plain")
    return Record(
        key=cell.key,
        fingerprint=f"f-{cell.key}",
        cell=cell,
        settings={"num_steps": 3} if is_trained else {},
        data=DataFacts(digest="d", num_train=9, num_validation=2, num_test=100, num_labels=2, majority_share=0.6),
        backbone="tiny",
        dtype="float32",
        scores=Scores(exact_match=exact_match, label_accuracy=label_accuracy, loss=1.0),
        training=make_training() if is_trained else None,
        group=Group(keys=(cell.key, "another"), seconds=20.0, peak_memory_mb=123.0) if is_trained else None,
        machine=MACHINE,
        date="2026-01-01",
    )


def make_latency_record(cell: Cell) -> Record:
    latency = Latency(first_token_ms=12.5, whole_ms=80.0, num_text_tokens=30, num_cached_tokens=16, num_new_tokens=8)
    return make_record(cell).model_copy(
        update={"scores": None, "training": None, "group": None, "latency": latency, "settings": {}}
    )


def make_training() -> Training:
    return Training(
        num_parameters=1000, num_steps=3, num_examples=48, seconds=10.0, learning_rate=0.1, best_step=2, best_loss=0.5
    )
