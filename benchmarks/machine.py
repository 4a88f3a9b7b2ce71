"""What a figure was measured on, and where it is kept. Refuses to know how anything is measured."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """CPU, cores, load, torch threads, GPU, versions and commit: what another run has to be compared with."""
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
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": sorted(flags & {"amx_bf16", "avx512_bf16"}),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def report(
    name: str,
    args: argparse.Namespace,
    machine: Mapping[str, Any],
    *,
    dtype: str,
    table: list[str],
    result: Mapping[str, Any],
) -> None:
    """Print the table, keep it and the result under `<name>-<dtype>`, and end with the result as one line of JSON.

    `machine` is what `describe_machine` said before the clock started, for the load average is part of it. A quick run
    is kept only where `--output` names a place: it must not replace a measured table.
    """
    module = f"benchmarks.bench_{name.replace('-', '_')}"
    whole = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
        "seed": args.seed,
        "dtype": dtype,
        "rounds": args.rounds,
        "quick": args.quick,
        "machine": dict(machine),
        **result,
    }
    text = "\n".join(table)
    print(text)
    stem = args.output or (None if args.quick else RESULTS / f"{name}-{dtype}")
    if stem is not None:
        _keep(stem, whole, text)
    print(json.dumps(whole))


def _keep(stem: Path, result: dict[str, Any], table: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['bf16']) or 'no bf16'})"
    if machine["gpu"]:
        where += f", {machine['gpu']}"
    head = (
        f"# {result['benchmark']}, {result['dtype']}\n\n`{result['command']}`\n\n{where}, {machine['torch_threads']} "
        f"threads, load average {machine['load_average'][0]} before the run, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}, commit {machine['commit']}, seed {result['seed']}, "
        f"{result['date']}.\n\n"
    )
    # Not with_suffix: a stem may hold a dot.
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    stem.with_name(f"{stem.name}.md").write_text(head + table + "\n")


def _commit() -> str:
    """The commit, marked when the files on disk differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
        check=False,
    )
    return done.stdout.strip()
