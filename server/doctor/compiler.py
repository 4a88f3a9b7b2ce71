"""The C++ compiler: kernels for the CPU are built with it, and steps are compiled. Found is not enough: it is tried.

What is tried is a few lines with what kernels and compiled steps need of it (the language, its headers, OpenMP, vector
instructions, a linker), in a temporary folder that is gone afterwards.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.doctor.findings import Finding
from server.settings import Settings

_FLAGS = ("-std=gnu++20", "-O2", "-fPIC", "-shared", "-fopenmp")
_SOURCE = """
#include <omp.h>
#include <cmath>
#include <span>
#include <vector>
extern "C" float promptmux_doctor(const float* values, int count) {
  float sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < count; ++i) sum += std::sqrt(std::span(values, count)[i]);
  return sum + std::vector<float>(omp_get_max_threads()).size();
}
"""
_TIMEOUT_S = 60.0


def check_compiler(settings: Settings) -> Iterator[Finding]:
    """Whether there is one and it works. Kernels that are built already serve without; compiled steps do not."""
    from server.engine.kernels.native import (
        BUILT_AHEAD,
        NativeUnavailableError,
        find_compiler,
        library_path,
        usable_levels,
    )

    level = usable_levels()[0]
    folders = (BUILT_AHEAD, settings.cache_dir / "native")
    built = next((path for folder in folders if (path := library_path(folder, level)).is_file()), None)
    try:
        compiler = find_compiler()
    except NativeUnavailableError as error:
        if built is not None:
            yield Finding("compiler", "ok", f"{error}, but kernels are built: {built}")
        else:
            advice = "install g++ 12 or later, or clang: without it plain torch serves, several times slower"
            yield Finding("compiler", "slow", str(error), advice)
        return
    failure = try_compiler(compiler, level.flags)
    if failure is not None:
        lost = "steps are not compiled" if built is not None else "plain torch serves, several times slower"
        advice = (
            "install g++ 12 or later with the headers of the C++ library and of OpenMP, and a linker (Debian: g++), or "
            f"let CXX name a compiler that works; till then {lost}"
        )
        yield Finding("compiler", "slow", f"{compiler} does not work: {failure}", advice)
        return
    state = "kernels are built" if built is not None else "kernels are built at the first start (about a minute)"
    yield Finding("compiler", "ok", f"{compiler}; {state}")


def try_compiler(compiler: str, flags: Sequence[str]) -> str | None:
    """What keeps `compiler` from making a shared library for these flags; None when it makes one."""
    try:
        with tempfile.TemporaryDirectory(prefix="promptmux-doctor-") as folder:
            source, library = Path(folder, "try.cpp"), Path(folder, "try.so")
            source.write_text(_SOURCE, encoding="ascii")
            command = [compiler, *_FLAGS, *flags, "-o", str(library), str(source)]
            done = subprocess.run(  # noqa: S603
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
            )
            if done.returncode == 0 and library.is_file():
                return None
    except subprocess.TimeoutExpired:
        return f"it did not end within {_TIMEOUT_S:g} seconds"
    except OSError as error:
        return str(error)
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    told = next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing")
    return f"it ended with {done.returncode}: {told.strip()[:300]}"
