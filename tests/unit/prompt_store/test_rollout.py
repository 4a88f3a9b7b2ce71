"""Canaries and gates: who answers for a task while a version is being tried."""

from dataclasses import replace

import pytest

from prompt_store.errors import (
    GateNotPassed,
    InvalidValue,
    PromptCorrupt,
    TaskNotFound,
    VersionActive,
    VersionConflict,
)
from prompt_store.manifest import Canary, GateStatus, PromptVersion
from prompt_store.probes import Probe
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import BACKBONE, CONFIG, flip_bit, make_config, make_file, put, tamper

PROBES = b'{"prompt": "x", "completion": "y"}\n\n{"completion": "b", "prompt": "a"}'


def put_gated(store: PromptStore, seed: int, **options: object) -> PromptVersion:
    return put(store, seed, **{"probes": PROBES, "gate_threshold": 0.5, **options})


def answer(store: PromptStore, request_id: str, reference: str = "task") -> int:
    return store.resolve("acme", reference, request_id=request_id).version


@pytest.fixture
def canary(store: PromptStore) -> PromptStore:
    """Version 2 is active, version 1 its canary for a quarter."""
    put(store, 1)
    put(store, 2)
    store.update_task("acme", "task", canary=Canary(1, 25))
    return store


def test_canary_answers_its_share_and_each_request_id_always_meets_the_same_version(canary: PromptStore) -> None:
    ids = [f"request-{index}" for index in range(4000)]
    answers = [answer(canary, request_id) for request_id in ids]

    # Binomial with standard deviation 27: five of them.
    assert 865 < answers.count(1) < 1135
    assert [answer(canary, request_id) for request_id in ids] == answers


def test_growing_canary_keeps_the_requests_that_it_had(canary: PromptStore) -> None:
    ids = [f"request-{index}" for index in range(400)]
    before = {request_id for request_id in ids if answer(canary, request_id) == 1}
    canary.update_task("acme", "task", canary=Canary(1, 60))
    after = {request_id for request_id in ids if answer(canary, request_id) == 1}

    assert before < after


def test_two_tasks_do_not_send_the_same_requests_to_their_canaries(canary: PromptStore) -> None:
    put(canary, 1, task="other")
    put(canary, 2, task="other")
    canary.update_task("acme", "other", canary=Canary(1, 25))
    ids = [f"request-{index}" for index in range(400)]

    assert {i for i in ids if answer(canary, i) == 1} != {i for i in ids if answer(canary, i, "other") == 1}


def test_named_versions_and_calls_without_an_id_never_meet_the_canary(canary: PromptStore) -> None:
    digest = canary.get_version("acme", "task", 2).digest
    for reference in ("task@2", f"task@sha256:{digest}"):
        assert {answer(canary, f"request-{index}", reference) for index in range(50)} == {2}
    assert canary.resolve("acme", "task").version == 2


def test_canary_of_a_shared_task_answers_other_tenants_too(store: PromptStore) -> None:
    put(store, 1, tenant="shared")
    put(store, 2, tenant="shared")
    store.update_task("shared", "task", canary=Canary(1, 50))

    assert {answer(store, f"request-{index}") for index in range(50)} == {1, 2}


@pytest.mark.parametrize(
    ("canary", "error", "param"),
    [
        (Canary(2, 10), VersionConflict, "canary.version"),
        (Canary(9, 10), TaskNotFound, "model"),
        (Canary(1, 0), InvalidValue, "canary.percent"),
        (Canary(1, 100), InvalidValue, "canary.percent"),
        (Canary(3, 10), GateNotPassed, "active_version"),
    ],
)
def test_refused_canary_changes_nothing(canary: Canary, error: type[Exception], param: str, store: PromptStore) -> None:
    put(store, 1)
    put(store, 2)
    put_gated(store, 3)
    with pytest.raises(error) as refused:
        store.update_task("acme", "task", canary=canary, pinned=True)
    assert refused.value.param == param  # type: ignore[attr-defined]
    task = store.get_task("acme", "task")
    assert (task.canary, task.pinned) == (None, False)


def test_task_without_an_active_version_takes_no_canary(store: PromptStore) -> None:
    put(store, 1, activate=False)
    with pytest.raises(VersionConflict):
        store.update_task("acme", "task", canary=Canary(1, 10))


@pytest.mark.parametrize("how", ["clear", "activate", "rollback", "upload", "quarantine", "delete"])
def test_canary_ends_when_its_version_is_rolled_out_or_gone(canary: PromptStore, how: str) -> None:
    if how == "clear":
        canary.update_task("acme", "task", canary=None)
    elif how == "activate":
        canary.update_task("acme", "task", active_version=1)
    elif how == "rollback":
        canary.rollback("acme", "task")
    elif how == "upload":
        put(canary, 1)
    elif how == "quarantine":
        first = canary.get_version("acme", "task", 1)
        tamper(canary, first.digest, flip_bit)
        with pytest.raises(PromptCorrupt):
            canary.load(first)
    else:
        canary.delete_task("acme", "task")
        with pytest.raises(TaskNotFound):
            answer(canary, "request-1")
        return

    assert canary.get_task("acme", "task").canary is None
    active = 2 if how in ("clear", "quarantine") else 1
    assert {answer(canary, f"request-{index}") for index in range(50)} == {active}


def test_canary_stays_when_another_version_is_rolled_out(canary: PromptStore) -> None:
    put(canary, 3)
    assert canary.get_task("acme", "task").canary == Canary(1, 25)
    assert {answer(canary, f"request-{index}") for index in range(50)} == {1, 3}


def test_canary_cannot_be_deleted(canary: PromptStore) -> None:
    with pytest.raises(VersionActive, match="canary"):
        canary.delete_version("acme", "task", 1)
    canary.update_task("acme", "task", canary=None)
    canary.delete_version("acme", "task", 1)


def test_activation_and_canary_in_one_change_are_seen_together(canary: PromptStore) -> None:
    task = canary.update_task("acme", "task", active_version=1, canary=Canary(2, 10), expected_version=2)
    assert (task.active_version, task.canary) == (1, Canary(2, 10))
    with pytest.raises(VersionConflict):
        canary.update_task("acme", "task", canary=None, expected_version=2)
    assert canary.get_task("acme", "task").canary == Canary(2, 10)


def test_gated_version_waits_until_it_has_passed(store: PromptStore) -> None:
    put(store, 1)
    gated = put_gated(store, 2)
    assert gated.gate is not None
    assert (gated.state, gated.gate.status, gated.gate.num_probes) == ("inactive", "pending", 2)
    with pytest.raises(GateNotPassed):
        store.update_task("acme", "task", active_version=2)
    assert [version.version for version in store.unfinished_gates()] == [2]
    store.set_gate("acme", "task", 2, status="running")

    passed = store.set_gate("acme", "task", 2, status="passed", score=1.0, detail={"examples": []})

    assert passed.gate is not None
    assert (passed.state, passed.gate.status, passed.gate.score) == ("active", "passed", 1.0)
    assert passed.gate.finished_at is not None
    assert store.resolve("acme", "task").version == 2
    assert store.unfinished_gates() == []


@pytest.mark.parametrize("status", ["failed", "error"])
def test_version_that_does_not_pass_cannot_be_made_active_in_any_way(store: PromptStore, status: GateStatus) -> None:
    put(store, 1)
    put_gated(store, 2)
    store.set_gate("acme", "task", 2, status=status, score=0.1)
    with pytest.raises(GateNotPassed):
        store.update_task("acme", "task", active_version=2)
    with pytest.raises(GateNotPassed):
        put(store, 2)
    assert store.resolve("acme", "task").version == 1
    store.check_invariants()


def test_what_is_resolved_and_remembered_leaves_the_gates_detail_in_the_database(store: PromptStore) -> None:
    put(store, 1)
    put_gated(store, 2)
    passed = store.set_gate("acme", "task", 2, status="passed", score=0.5, detail={"failures": ["long"] * 100})
    assert passed.gate is not None
    without = replace(passed, gate=replace(passed.gate, detail={}))
    for _ in range(2):
        assert store.resolve("acme", "task") == without
    store.update_task("acme", "task", active_version=1, canary=Canary(2, 99))
    assert {store.resolve("acme", "task", request_id=str(number)).gate for number in range(9)} <= {None, without.gate}
    assert store.get_version("acme", "task", 2).gate == passed.gate


def test_passed_gate_of_an_upload_that_does_not_activate_leaves_the_choice(store: PromptStore) -> None:
    put(store, 1)
    put_gated(store, 2, activate=False)
    assert store.set_gate("acme", "task", 2, status="passed", score=1.0).state == "inactive"
    assert store.update_task("acme", "task", active_version=2).active_version == 2


def test_passed_gate_does_not_undo_what_was_rolled_out_meanwhile(store: PromptStore) -> None:
    put(store, 1)
    put_gated(store, 2)
    put(store, 3)
    late = store.set_gate("acme", "task", 2, status="passed", score=1.0)
    assert late.gate is not None
    assert (late.state, late.gate.status, late.gate.score) == ("inactive", "conflict", 1.0)
    assert store.update_task("acme", "task", active_version=2).active_version == 2


def test_first_version_of_a_task_may_have_a_gate(store: PromptStore) -> None:
    put_gated(store, 1)
    with pytest.raises(TaskNotFound):
        store.resolve("acme", "task")
    store.set_gate("acme", "task", 1, status="passed", score=1.0)
    assert store.resolve("acme", "task").version == 1


def test_gate_that_begins_anew_is_against_what_is_active_then(store: PromptStore) -> None:
    put(store, 1)
    put_gated(store, 2)
    put(store, 3)
    store.set_gate("acme", "task", 2, status="failed", score=0.0)
    again = store.set_gate("acme", "task", 2, status="pending")
    assert again.gate is not None
    assert (again.gate.score, again.gate.finished_at, again.gate.expected_version) == (None, None, 3)
    assert store.set_gate("acme", "task", 2, status="passed", score=1.0).state == "active"


def test_repeated_gated_upload_asks_nothing_new_until_the_check_has_ended(store: PromptStore) -> None:
    put(store, 1)
    first = put_gated(store, 2)
    assert put_gated(store, 2) == first
    store.set_gate("acme", "task", 2, status="failed", score=0.2)
    again = put_gated(store, 2)
    assert again.gate is not None
    assert (again.version, again.gate.status, again.gate.score) == (2, "pending", None)


def test_what_was_found_of_other_probes_passes_no_gate(store: PromptStore) -> None:
    put(store, 1)
    measured = put_gated(store, 2, gate_threshold=0.1)
    store.set_gate("acme", "task", 2, status="running", measured=measured)
    stricter = put_gated(store, 2, gate_threshold=1.0)
    with pytest.raises(VersionConflict):
        store.set_gate("acme", "task", 2, status="passed", score=0.5, measured=measured)
    assert store.get_version("acme", "task", 2) == stricter
    others = put_gated(store, 2, gate_threshold=1.0, probes=b'{"prompt": "other", "completion": "y"}')
    with pytest.raises(VersionConflict):
        store.set_gate("acme", "task", 2, status="passed", score=1.0, measured=stricter)
    assert store.set_gate("acme", "task", 2, status="passed", score=1.0, measured=others).state == "active"


def test_gate_that_has_ended_is_not_ended_again_by_a_check(store: PromptStore) -> None:
    put(store, 1)
    measured = put_gated(store, 2)
    store.set_gate("acme", "task", 2, status="passed", score=1.0, measured=measured)
    store.rollback("acme", "task")
    again: tuple[GateStatus, ...] = ("running", "passed")
    for status in again:
        with pytest.raises(VersionConflict):
            store.set_gate("acme", "task", 2, status=status, measured=measured)
    assert store.resolve("acme", "task").version == 1


def test_gate_is_refused_for_a_version_that_has_none(store: PromptStore) -> None:
    put(store, 1)
    with pytest.raises(InvalidValue, match="no gate"):
        store.set_gate("acme", "task", 1, status="passed", score=1.0)


def test_probes_are_kept_with_the_version_and_go_with_the_last_that_has_them(store: PromptStore) -> None:
    put(store, 1)
    first = put_gated(store, 2)
    # Nothing else in common: another configuration too.
    other = make_config(num_layers=3)
    second, _ = store.upload("acme", "task", file=make_file(seed=3), config=other, activate=False, probes=PROBES)
    assert first.probes_digest is not None
    assert first.probes_digest == second.probes_digest
    assert store.read_probes(second) == (Probe("x", "y"), Probe("a", "b"))
    assert store.read_probes(store.get_version("acme", "task", 1)) == ()

    store.delete_version("acme", "task", 3)
    assert len(store.read_probes(first)) == 2
    store.delete_version("acme", "task", 2)
    assert not store._blobs.exists(first.probes_digest)
    store.check_invariants()


def test_other_probes_for_the_same_file_replace_those_that_no_gate_was_measured_by(store: PromptStore) -> None:
    put(store, 1, probes=PROBES)
    other = b'{"prompt": "new", "completion": "one"}'
    assert store.read_probes(put(store, 1, probes=other)) == (Probe("new", "one"),)
    store.check_invariants()
    put_gated(store, 2)
    assert len(store.read_probes(put(store, 2, probes=other, activate=False))) == 2
    store.check_invariants()


def test_damaged_probes_quarantine_their_version(store: PromptStore) -> None:
    version = put(store, 1, probes=PROBES)
    assert version.probes_digest is not None
    tamper(store, version.probes_digest, flip_bit)
    with pytest.raises(PromptCorrupt):
        store.read_probes(version)
    assert store.get_version("acme", "task", 1).state == "quarantined"


def test_gates_and_canaries_are_in_the_audit_log(store: PromptStore) -> None:
    put(store, 1)
    put_gated(store, 2)
    store.set_gate("acme", "task", 2, status="running")
    store.set_gate("acme", "task", 2, status="passed", score=0.75, actor="gate")
    store.update_task("acme", "task", canary=Canary(1, 10), actor="key_1")
    store.update_task("acme", "task", canary=Canary(1, 10), actor="key_1")
    store.update_task("acme", "task", canary=None, actor="key_2")

    entries = [(entry.action, entry.version, entry.actor) for entry in store.iter_audit("acme", task="task")]
    assert entries[2:] == [
        ("activate", 2, "gate"),
        ("gate", 2, "gate"),
        ("set_canary", 1, "key_1"),
        ("clear_canary", None, "key_2"),
    ]


def test_provenance_says_where_a_version_comes_from(store: PromptStore) -> None:
    key, _ = store.create_key("acme", ["write"], "trainer in CI")
    version = put(store, 1, training_run="run 7", data_digest="sha256:12", created_by=key.id)

    provenance = store.get_version("acme", "task", 1).provenance
    assert (provenance.training_run, provenance.data_digest) == ("run 7", "sha256:12")
    assert (provenance.key_id, provenance.key_label) == (key.id, "trainer in CI")
    assert (provenance.backbone_name, provenance.backbone_fingerprint) == (BACKBONE.name, BACKBONE.fingerprint)
    assert provenance.uploaded_at == version.created_at


def test_gate_without_probes_is_refused(store: PromptStore) -> None:
    with pytest.raises(InvalidValue) as refused:
        store.upload("acme", "task", file=make_file(), config=CONFIG, gate_threshold=0.5)
    assert refused.value.param == "probes"
