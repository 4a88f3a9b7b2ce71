"""What a figure was measured on: what another run has to be compared with. Imports nothing that is measured."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from server import __version__

_PACKAGES = ("torch", "transformers", "numpy", "httpx")
_ROOT = Path(__file__).resolve().parents[2]
_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


def describe_environment() -> dict[str, Any]:
    """Machine, versions and commit of this process, ready for JSON."""
    cpu, flags = _cpu()
    return {
        "commit": _commit(),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "bf16": sorted(flags & _BF16_FLAGS),
            "platform": platform.platform(),
        },
        "versions": {
            "promptmux": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
    }


def _cpu() -> tuple[str, frozenset[str]]:
    """The processor's name and its instruction sets, as far as the system tells."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = frozenset(value.split())
    return name, flags


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None when the package is no checkout."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
