"""Random schedules of uploads, gates, canaries, activations, rollbacks, deletions and restarts, against a model."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import create_engine, text

from prompt_store.errors import GateNotPassed, InvalidValue, TaskNotFound, VersionActive, VersionConflict
from prompt_store.location import Location, parse_store_url
from prompt_store.manifest import Canary, GateStatus
from prompt_store.store import PromptStore
from tests.unit.prompt_store.conftest import TABLES
from tests.unit.prompt_store.prompt_files import BACKBONE, make_config, make_file

CONFIG = make_config()
FILES = [make_file(seed=seed) for seed in range(3)]
PROBES = b'{"prompt": "x", "completion": "y"}'

# Few things in few places, so that they meet often.
tenants = st.sampled_from(["acme", "acme", "acme", "shared"])
files = st.integers(0, len(FILES) - 1)
numbers = st.integers(1, 3)


@dataclass
class ModelGate:
    activates: bool
    expected: int
    status: GateStatus = "pending"


@dataclass
class ModelTask:
    versions: dict[int, int] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    gates: dict[int, ModelGate] = field(default_factory=dict)
    canary: int | None = None
    num_made: int = 0
    retired: bool = False

    @property
    def active(self) -> int | None:
        return self.history[-1] if self.history else None

    def activate(self, version: int) -> None:
        if self.active != version:
            self.history.append(version)
        self.end_trial()

    def end_trial(self) -> None:
        """What is active is no canary."""
        if self.canary == self.active:
            self.canary = None

    def may_answer(self, version: int) -> bool:
        return version not in self.gates or self.gates[version].status in ("passed", "conflict")

    def find(self, file: int) -> int | None:
        return next((version for version, held in self.versions.items() if held == file), None)

    def take(self, file: int) -> int:
        """The file's version, made if there is none."""
        number = self.find(file)
        if number is None:
            self.num_made += 1
            number = self.num_made
            self.versions[number] = file
        return number


class StoreSchedule(RuleBasedStateMachine):
    @initialize(num_versions=st.integers(0, len(FILES)))
    def start(self, num_versions: int) -> None:
        self.location = self.make_location()
        self.store = PromptStore.open(self.location, backbone=BACKBONE)
        self.model: dict[str, ModelTask] = {}
        for file in range(num_versions):
            self.compare_upload("acme", file, True, None)

    def teardown(self) -> None:
        self.store.close()
        self.remove_location()

    def make_location(self) -> Location:
        # In memory where there is such a folder: what a disk may do to the store is for other tests.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        return Path(tempfile.mkdtemp(prefix="store-", dir=memory))

    def remove_location(self) -> None:
        assert isinstance(self.location, Path)
        shutil.rmtree(self.location)

    def live(self, tenant: str) -> ModelTask | None:
        task = self.model.get(tenant)
        return None if task is None or task.retired else task

    @rule(tenant=tenants, file=files)
    def upload(self, tenant: str, file: int) -> None:
        self.compare_upload(tenant, file, True, None)

    @rule(tenant=tenants, file=files, activate=st.booleans(), expected=st.none() | st.integers(0, 4))
    def upload_with_conditions(self, tenant: str, file: int, activate: bool, expected: int | None) -> None:
        self.compare_upload(tenant, file, activate, expected)

    def compare_upload(self, tenant: str, file: int, activate: bool, expected: int | None) -> None:
        task = self.model.get(tenant)
        number = task.find(file) if task else None
        settled = task is not None and number is not None and (not activate or task.active == number)
        refused = (task is not None and task.retired) or (
            not settled and expected is not None and expected != (0 if task is None else task.active or -1)
        )
        try:
            version, created = self.store.upload(
                tenant, "task", file=FILES[file], config=CONFIG, activate=activate, expected_version=expected
            )
        except VersionConflict:
            assert refused
            return
        except GateNotPassed:
            assert task is not None
            assert number is not None
            assert activate
            assert not refused
            assert not settled
            assert not task.may_answer(number)
            return
        assert not refused
        task = self.model.setdefault(tenant, ModelTask())
        assert created == (number is None)
        number = task.take(file)
        assert version.version == number
        if activate:
            task.activate(number)

    @rule(tenant=tenants, file=files, activates=st.booleans())
    def upload_with_a_gate(self, tenant: str, file: int, activates: bool) -> None:
        task = self.model.get(tenant)
        try:
            version, _ = self.store.upload(
                tenant,
                "task",
                file=FILES[file],
                config=CONFIG,
                activate=activates,
                probes=PROBES,
                gate_threshold=0.5,
            )
        except VersionConflict:
            assert task is not None
            assert task.retired
            return
        task = self.model.setdefault(tenant, ModelTask())
        number = task.take(file)
        assert version.version == number
        gate = task.gates.get(number)
        is_waited_for = gate is not None and gate.activates == activates and gate.status == "pending"
        has_passed = gate is not None and not (gate.activates or activates) and gate.status == "passed"
        if task.active != number and not (is_waited_for or has_passed):
            task.gates[number] = ModelGate(activates, task.active or 0)

    @rule(tenant=tenants, number=numbers, passes=st.booleans())
    def end_a_gate(self, tenant: str, number: int, passes: bool) -> None:
        task = self.live(tenant)
        try:
            self.store.set_gate(tenant, "task", number, status="passed" if passes else "failed", score=0.5)
        except TaskNotFound:
            assert task is None or number not in task.versions
            return
        except InvalidValue:
            assert task is not None
            assert number not in task.gates
            return
        assert task is not None
        gate = task.gates[number]
        gate.status = "passed" if passes else "failed"
        if passes and gate.activates and task.active != number:
            if gate.expected == (task.active or 0):
                task.activate(number)
            else:
                gate.status = "conflict"

    @rule(tenant=tenants, number=st.none() | numbers)
    def change_canary(self, tenant: str, number: int | None) -> None:
        task = self.live(tenant)
        try:
            self.store.update_task(tenant, "task", canary=None if number is None else Canary(number, 50))
        except TaskNotFound:
            assert task is None or number not in task.versions
        except VersionConflict:
            assert task is not None
            assert task.active in (None, number)
        except GateNotPassed:
            assert task is not None
            assert number is not None
            assert not task.may_answer(number)
        else:
            assert task is not None
            assert number is None or number in task.versions
            task.canary = number

    @rule(tenant=tenants, number=numbers)
    def activate(self, tenant: str, number: int) -> None:
        task = self.live(tenant)
        try:
            self.store.update_task(tenant, "task", active_version=number)
        except TaskNotFound:
            assert task is None or number not in task.versions
        except GateNotPassed:
            assert task is not None
            assert task.active != number
            assert not task.may_answer(number)
        else:
            assert task is not None
            assert task.active == number or task.may_answer(number)
            task.activate(number)

    @rule(tenant=tenants)
    def roll_back(self, tenant: str) -> None:
        task = self.live(tenant)
        earlier = list(task.history) if task else []
        while task is not None and earlier and (earlier[-1] == task.active or not task.may_answer(earlier[-1])):
            earlier.pop()
        try:
            result = self.store.rollback(tenant, "task")
        except TaskNotFound:
            assert task is None
        except VersionConflict:
            assert not earlier
        else:
            assert task is not None
            task.history = earlier
            task.end_trial()
            assert result.active_version == task.active

    @rule(tenant=tenants, number=numbers)
    def delete_version(self, tenant: str, number: int) -> None:
        task = self.live(tenant)
        try:
            self.store.delete_version(tenant, "task", number)
        except TaskNotFound:
            assert task is None or number not in task.versions
        except VersionActive:
            assert task is not None
            assert number in (task.active, task.canary)
        else:
            assert task is not None
            assert number not in (task.active, task.canary)
            del task.versions[number]
            task.gates.pop(number, None)
            task.history = [version for version in task.history if version != number]

    @rule(tenant=tenants, dice=st.integers(1, 6))
    def delete_task(self, tenant: str, dice: int) -> None:
        if dice < 6:
            # Nothing more happens to a name once it is retired: not too early.
            return
        task = self.live(tenant)
        try:
            self.store.delete_task(tenant, "task")
        except TaskNotFound:
            assert task is None
        else:
            self.model[tenant] = ModelTask(retired=True)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = PromptStore.open(self.location, backbone=BACKBONE)

    @invariant()
    def every_reference_means_what_the_model_says(self) -> None:
        self.compare_task("acme")
        self.compare_task("shared")
        own = self.model.get("acme")
        meant = own if own is not None else self.model.get("shared")
        try:
            found = self.store.resolve("acme", "task")
        except TaskNotFound:
            assert meant is None or meant.active is None
        else:
            assert meant is not None
            assert found.version == meant.active
            assert self.store.read_file(found) == FILES[meant.versions[found.version]]
            tried = {self.store.resolve("acme", "task", request_id=str(number)).version for number in range(20)}
            assert tried == {meant.active, meant.canary or meant.active}
        self.store.check_invariants()

    def compare_task(self, tenant: str) -> None:
        model = self.live(tenant)
        try:
            task = self.store.get_task(tenant, "task")
        except TaskNotFound:
            assert model is None
            return
        assert model is not None
        assert task.active_version == model.active
        assert task.canary == (None if model.canary is None else Canary(model.canary, 50))
        listed = self.store.list_versions(tenant, "task")
        assert [version.version for version in listed] == sorted(model.versions, reverse=True)
        held = {version.version: version.gate.status for version in listed if version.gate is not None}
        assert held == {number: gate.status for number, gate in model.gates.items()}
        assert [version.version for version in listed if version.state == "active"] == [
            version for version in [model.active] if version is not None
        ]


StoreSchedule.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestStoreSchedules = StoreSchedule.TestCase


class SharedStoreSchedule(StoreSchedule):
    """One database, emptied after each example: making a fresh one takes longer than most examples."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def make_location(self) -> Location:
        return self.url

    def remove_location(self) -> None:
        engine = create_engine(parse_store_url(self.url))
        with engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY"))
        engine.dispose()


def test_schedules_on_a_shared_database(url: str) -> None:
    run_state_machine_as_test(
        lambda: SharedStoreSchedule(url),
        settings=settings(max_examples=15, stateful_step_count=30, deadline=None),
    )
