"""Peak memory is what the work needed, whatever was held or needed before."""

import subprocess
import sys

import pytest
import torch

# In a process of its own: here, other tests' memory may be given back just then.
WORK = """
import torch
from benchmarks.peak_memory import PeakMemory

torch.ones(200_000_000 // 4)
peak = PeakMemory()
torch.ones(80_000_000 // 4)
print(peak.mb)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is set back on Linux alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU's memory there")
def test_peak_is_of_the_work_alone() -> None:
    answer = subprocess.run([sys.executable, "-c", WORK], check=True, capture_output=True, text=True)
    assert 75 < float(answer.stdout) < 120
