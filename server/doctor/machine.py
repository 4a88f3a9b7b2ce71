"""The machine: CPU, threads, open files, temporary folder, clock."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from server.doctor.findings import Finding
from server.settings import Settings

MIN_OPEN_FILES = 4096
# No clock is right that lies before this release was made.
_EARLIEST = datetime(2025, 1, 1, tzinfo=UTC)


def check_cpu(settings: Settings) -> Iterator[Finding]:
    """Which instructions the products can use. Of no weight where the backbone runs on a GPU."""
    import torch

    from server.engine.kernels.native import all_levels, usable_levels

    level, best = usable_levels()[0].name, all_levels()[0].name
    has = torch.cpu.get_capabilities()
    seen = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16") if has.get(name, False)]
    detail = f"{platform.machine()}, kernels for {level}; {', '.join(seen) or 'no vector instructions known'}"
    if level == best or (settings.device.startswith("cuda") or torch.cuda.is_available()):
        yield Finding("cpu", "ok", detail)
        return
    advice = "products in bfloat16 are fast from AVX512-bf16 on; elsewhere expect float32 speed"
    yield Finding("cpu", "slow", detail, advice)


def check_threads(settings: Settings) -> Iterator[Finding]:
    """The engine's threads against the cores that this process may use."""
    from server.engine.threads import choose_threads, count_cores, read_cpu_limit

    cores = count_cores(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    limit = read_cpu_limit()
    allowed = cores if limit is None else min(cores, max(1, int(limit)))
    threads = settings.num_threads if settings.num_threads is not None else choose_threads()
    container = "" if limit is None else f", the container's limit is {limit:g}"
    detail = f"{threads} threads on {cores} physical cores{container}"
    if threads > allowed:
        yield Finding(
            "threads", "slow", detail, f"--num-threads {allowed}: more threads than cores wait for each other"
        )
    elif threads < allowed:
        advice = f"--num-threads {allowed}, or unset OMP_NUM_THREADS, if nothing else needs the other cores"
        yield Finding("threads", "slow", detail, advice)
    else:
        yield Finding("threads", "ok", detail)


def check_open_files(_: Settings) -> Iterator[Finding]:
    """Each client takes a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        yield Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")
        return
    may = "" if hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES else f" (the hard limit is {hard}: ask root)"
    advice = f"`ulimit -n {MIN_OPEN_FILES}`, or LimitNOFILE= in the unit{may}: each client takes one"
    yield Finding("open files", "slow", f"at most {soft}", advice)


def check_clock(_: Settings) -> Iterator[Finding]:
    """Receipts and the audit log carry the machine's time."""
    now = datetime.now(UTC)
    if now < _EARLIEST:
        advice = "set the clock (NTP): audit log and receipts carry its time"
        yield Finding("clock", "wrong", f"it is {now:%Y-%m-%d %H:%M} UTC here", advice)
        return
    before, started = time.time(), time.monotonic()
    time.sleep(0.05)
    drift = abs((time.time() - before) - (time.monotonic() - started))
    if drift > 0.01:
        yield Finding("clock", "slow", f"it jumped by {drift * 1000:.0f} ms within a blink", "let NTP slew, not step")
        return
    yield Finding("clock", "ok", f"{now:%Y-%m-%d %H:%M:%S} UTC")


def check_temporary_folder(_: Settings) -> Iterator[Finding]:
    """Where temporary files of compiled steps go."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - looked at, not written to
    if os.access(folder, os.W_OK):
        yield Finding("temporary folder", "ok", str(folder))
    else:
        yield Finding("temporary folder", "wrong", f"{folder} cannot be written to", "set TMPDIR")
