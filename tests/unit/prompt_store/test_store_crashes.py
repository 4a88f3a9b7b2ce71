"""SIGKILL at every failpoint of a process: what was acknowledged is there, the rest is wholly old or new."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from sqlalchemy import event

from prompt_store import failpoints
from prompt_store.errors import TaskNotFound
from prompt_store.location import Location
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import BACKBONE, make_config, make_file

REPOSITORY = Path(__file__).parents[3]
CONFIG, OTHER_CONFIG = make_config(), make_config(num_layers=3)
OLD, NEW = make_file(seed=1), make_file(seed=2)
PROBES = b'{"prompt": "x", "completion": "y"}'


def work(location: Location, operation: str, failpoint: str | None, acknowledgement: Path) -> None:
    """Runs in the process that is killed; touches a file once the operation was acknowledged."""
    store = PromptStore.open(location, backbone=BACKBONE)
    with failpoints.armed(f"{failpoint}:kill" if failpoint else None):
        change(store, operation)
    acknowledgement.touch()


def change(store: PromptStore, operation: str) -> None:
    if operation == "upload":
        store.upload("t", "task", file=NEW, config=CONFIG)
    elif operation == "first_upload":
        store.upload("t", "fresh", file=NEW, config=OTHER_CONFIG)
    elif operation == "gated_upload":
        store.upload("t", "task", file=NEW, config=CONFIG, probes=PROBES, gate_threshold=1.0)
    elif operation == "pass_gate":
        store.set_gate("t", "task", 2, status="passed", score=1.0)
    elif operation == "activate":
        store.update_task("t", "task", active_version=2)
    elif operation == "rollback":
        store.rollback("t", "task")
    elif operation == "delete_version":
        store.delete_version("t", "task", 1)
    elif operation == "delete_task":
        store.delete_task("t", "task")


CASES = (
    [("upload", name) for name in failpoints.UPLOAD_FAILPOINTS]
    + [("first_upload", name) for name in failpoints.UPLOAD_FAILPOINTS]
    + [("gated_upload", name) for name in failpoints.UPLOAD_FAILPOINTS]
    + [
        (operation, name)
        for operation in ("activate", "rollback", "pass_gate")
        for name in failpoints.ACTIVATE_FAILPOINTS
    ]
    + [(operation, name) for operation in ("delete_version", "delete_task") for name in failpoints.DELETE_FAILPOINTS]
)


@pytest.fixture
def acknowledgement(tmp_path: Path) -> Path:
    return tmp_path / "acknowledged"


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes forked from one that has the store imported and no threads: as good as fresh ones, and quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prompt_store.store", "tests.unit.prompt_store.prompt_files"])
    return context


def run(
    processes: ForkServerContext, acknowledgement: Path, location: Location, operation: str, failpoint: str | None
) -> tuple[int | None, bool]:
    """The exit code, and whether the operation was acknowledged."""
    process = processes.Process(target=work, args=(location, operation, failpoint, acknowledgement))
    process.start()
    process.join(60)
    return process.exitcode, acknowledgement.exists()


def describe(store: PromptStore) -> dict[str, tuple[int | None, list[int]]]:
    found = {}
    for name in ("task", "fresh"):
        try:
            task = store.get_task("t", name)
        except TaskNotFound:
            continue
        found[name] = (task.active_version, [version.version for version in store.list_versions("t", name)])
    return found


def prepare(location: Location, operation: str) -> dict[str, tuple[int | None, list[int]]]:
    with PromptStore.open(location, backbone=BACKBONE) as store:
        store.upload("t", "task", file=OLD, config=CONFIG)
        if operation == "pass_gate":
            store.upload("t", "task", file=NEW, config=CONFIG, probes=PROBES, gate_threshold=1.0)
        if operation in ("activate", "rollback", "delete_version"):
            other = NEW if operation == "activate" else make_file(seed=3)
            store.upload("t", "task", file=other, config=CONFIG, activate=operation != "activate")
        return describe(store)


def no_leftovers(store: PromptStore) -> bool:
    return store.root is None or not list((store.root / "tmp").iterdir())


AFTER = {
    "upload": {"task": (2, [2, 1])},
    "first_upload": {"task": (1, [1]), "fresh": (1, [1])},
    "gated_upload": {"task": (1, [2, 1])},
    "pass_gate": {"task": (2, [2, 1])},
    "activate": {"task": (2, [2, 1])},
    "rollback": {"task": (1, [2, 1])},
    "delete_version": {"task": (2, [2])},
    "delete_task": {},
}


@pytest.mark.parametrize(("operation", "failpoint"), CASES)
def test_killed_operation_leaves_the_old_or_the_new_state_and_no_leftovers(
    operation: str, failpoint: str, location: Location, acknowledgement: Path, processes: ForkServerContext
) -> None:
    before = prepare(location, operation)
    assert run(processes, acknowledgement, location, operation, failpoint) == (-signal.SIGKILL, False)
    with PromptStore.open(location, backbone=BACKBONE) as store:
        committed = {failpoints.UPLOAD_COMMITTED, failpoints.ACTIVATE_COMMITTED}
        if store.root is not None:
            # Where a blob is a file, it goes after the row; in a database the two go together.
            committed |= {failpoints.DELETE_COMMITTED, failpoints.DELETE_BLOB_REMOVED}
        assert describe(store) == (AFTER[operation] if failpoint in committed else before)
        store.check_invariants()
        assert no_leftovers(store)
        for name in describe(store):
            store.load(store.resolve("t", name))
            for version in store.list_versions("t", name):
                assert (version.gate is None) == (store.read_probes(version) == ())


def work_until(url: str, operation: str, last_write: int, acknowledgement: Path) -> None:
    """As `work`, and dies before the write after the last one; a commit counts as one."""
    counted = itertools.count(1)

    def before_commit(_: object) -> None:
        if next(counted) > last_write:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_statement(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            before_commit(connection)

    store = PromptStore.open(url, backbone=BACKBONE, exclusive=False)
    event.listen(store._database.engine, "before_cursor_execute", before_statement)
    event.listen(store._database.engine, "commit", before_commit)
    change(store, operation)
    acknowledgement.touch()


@pytest.mark.parametrize("operation", ["upload", "delete_task"])
def test_client_killed_between_any_two_writes_leaves_the_old_or_the_new_state(
    operation: str, url: str, acknowledgement: Path, processes: ForkServerContext
) -> None:
    before = prepare(url, operation)
    with PromptStore.open(url, backbone=BACKBONE, exclusive=False) as store:
        for last_write in itertools.count():
            process = processes.Process(target=work_until, args=(url, operation, last_write, acknowledgement))
            process.start()
            process.join(60)
            store.check_invariants()
            if process.exitcode == 0:
                break
            assert not acknowledgement.exists()
            # Nothing is sent after the commit, before which it dies for the last time.
            assert describe(store) == before
        assert acknowledgement.exists()
        assert describe(store) == AFTER[operation]
    assert last_write >= 5


@pytest.mark.parametrize("operation", AFTER)
def test_acknowledged_operation_is_there(
    operation: str, location: Location, acknowledgement: Path, processes: ForkServerContext
) -> None:
    prepare(location, operation)
    assert run(processes, acknowledgement, location, operation, None) == (0, True)
    with PromptStore.open(location, backbone=BACKBONE) as store:
        assert describe(store) == AFTER[operation]
        store.check_invariants()


@pytest.mark.parametrize("name", failpoints.UPLOAD_FAILPOINTS)
def test_unforeseen_exception_in_an_upload_leaves_the_old_or_the_new_state(store: PromptStore, name: str) -> None:
    store.upload("t", "task", file=OLD, config=CONFIG)
    with failpoints.armed(f"{name}:raise"), pytest.raises(failpoints.FailpointReached):
        store.upload("t", "task", file=NEW, config=OTHER_CONFIG)
    committed = name == failpoints.UPLOAD_COMMITTED
    assert describe(store) == {"task": (2, [2, 1]) if committed else (1, [1])}
    store.check_invariants()
    assert no_leftovers(store)
    version, created = store.upload("t", "task", file=NEW, config=OTHER_CONFIG)
    assert (version.version, created) == (2, not committed)


@pytest.mark.parametrize("spec", ["nope:kill", "upload.committed", "upload.committed:explode", ""])
def test_unknown_failpoint_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="expected one of"), failpoints.armed(spec):
        pass


def test_environment_arms_a_failpoint() -> None:
    script = "from prompt_store import failpoints; failpoints.hit(failpoints.UPLOAD_COMMITTED); print('alive')"
    for name, expected in ((failpoints.UPLOAD_COMMITTED, -signal.SIGKILL), (failpoints.BLOB_RENAMED, 0)):
        environment = os.environ | {failpoints.ENVIRONMENT_VARIABLE: f"{name}:kill"}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=REPOSITORY, capture_output=True, check=False
        )
        assert result.returncode == expected
