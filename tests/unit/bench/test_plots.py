"""Pictures are written, for loads of any shape, and ask for their library before a load is sent."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from server.bench.load import Failure, LoadResult
from server.bench.plots import PlotsUnavailableError, require_matplotlib, write_plots
from server.bench.server_metrics import StepStats
from tests.unit.bench.records import load_of, record

STEPS = StepStats(
    num_steps=4,
    phases_s={"plan": 0.2, "forward": 1.0},
    mean_rows=6.5,
    mean_distinct_prompts=2.5,
    num_prompt_loads=3,
    num_preemptions=1,
    num_isolation_violations=0,
)
BROKEN = record([], ended_s=0.5, failure=Failure(kind="timeout", message=""))
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


@needs_matplotlib
@pytest.mark.parametrize(
    "load",
    [
        load_of(record([0.5, 0.75, 1.5]), record([1.0], due_s=0.5), BROKEN),
        load_of(BROKEN),
        LoadResult(records=[], wall_s=0.0),
    ],
)
def test_each_picture_is_a_png(tmp_path: Path, load: LoadResult) -> None:
    paths = write_plots(tmp_path / "new" / "folder", load, STEPS)

    assert [path.name for path in paths] == ["latency.png", "timeline.png", "steps.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_without_steps_there_is_no_picture_of_them(tmp_path: Path) -> None:
    paths = write_plots(tmp_path, load_of(record([0.5])), None)

    assert [path.name for path in paths] == ["latency.png", "timeline.png"]


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python itself marks what cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(PlotsUnavailableError, match=r"promptmux\[bench\]"):
        require_matplotlib()


def test_the_online_side_imports_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys; import server.cli.bench_run, server.cli.bench_targets; "
        "slow = {'torch', 'transformers', 'matplotlib', 'sqlalchemy', 'fastapi'} & set(sys.modules); "
        "print(slow); sys.exit(bool(slow))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
