"""Random schedules of uploads, activations, rollbacks, deletions and restarts, compared with a model."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prompt_store.errors import TaskNotFound, VersionActive, VersionConflict
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import BACKBONE, make_config, make_file

CONFIG = make_config()
FILES = [make_file(seed=seed) for seed in range(4)]

# Few things in few places, so that they meet often.
tenants = st.sampled_from(["acme", "acme", "acme", "shared"])
files = st.integers(0, len(FILES) - 1)
numbers = st.integers(1, 4)


@dataclass
class ModelTask:
    versions: dict[int, int] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    num_made: int = 0
    retired: bool = False

    @property
    def active(self) -> int | None:
        return self.history[-1] if self.history else None

    def activate(self, version: int) -> None:
        if self.active != version:
            self.history.append(version)


class StoreSchedule(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        # In memory where there is such a folder: what a disk may do to the store is for other tests.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="store-", dir=memory))
        self.store = PromptStore.open(self.root, backbone=BACKBONE)
        self.model: dict[str, ModelTask] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

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
        number = next((v for v, f in task.versions.items() if f == file), None) if task else None
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
        assert not refused
        task = self.model.setdefault(tenant, ModelTask())
        assert created == (number is None)
        if number is None:
            task.num_made += 1
            number = task.num_made
            task.versions[number] = file
        assert version.version == number
        if activate:
            task.activate(number)

    @rule(tenant=tenants, number=numbers)
    def activate(self, tenant: str, number: int) -> None:
        task = self.live(tenant)
        try:
            self.store.update_task(tenant, "task", active_version=number)
        except TaskNotFound:
            assert task is None or number not in task.versions
        else:
            assert task is not None
            task.activate(number)

    @rule(tenant=tenants)
    def roll_back(self, tenant: str) -> None:
        task = self.live(tenant)
        earlier = list(task.history) if task else []
        while earlier and earlier[-1] == task.active:  # type: ignore[union-attr]
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
            assert task.active == number
        else:
            assert task is not None
            assert task.active != number
            del task.versions[number]
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
        self.store = PromptStore.open(self.root, backbone=BACKBONE)

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
        listed = self.store.list_versions(tenant, "task")
        assert [version.version for version in listed] == sorted(model.versions, reverse=True)
        assert [version.version for version in listed if version.state == "active"] == [
            version for version in [model.active] if version is not None
        ]


StoreSchedule.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestStoreSchedules = StoreSchedule.TestCase
