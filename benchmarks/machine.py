"""What a figure was measured on, and where it is kept."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """CPU, cores, torch threads, versions and commit: what another run has to be compared with."""
    model = platform.processor()
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": sorted(flags & {"amx_bf16", "avx512_bf16"}),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def keep(name: str, result: dict[str, Any], table: str) -> None:
    """Write `results/<name>.json` and `.md`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = result["machine"]
    head = (
        f"# {name}\n\n`{result['command']}`\n\n{machine['cpu']}, {machine['cores']} cores "
        f"({', '.join(machine['bf16']) or 'no bf16'}), {machine['torch_threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}, commit {machine['commit']}, seed "
        f"{result['seed']}, {result['date']}.\n\n"
    )
    (RESULTS / f"{name}.md").write_text(head + table + "\n")
