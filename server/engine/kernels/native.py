"""The C++ kernels for CPU: builds them once for this torch and this kind of CPU, loads them, and calls them.

Owns the compiler's command line, the cache of built libraries and the Python side of `torch.ops.promptmux`. Refuses to
know who calls the operators and when. Every `.cpp` in the folder `native` goes into one library; what they compute is
told there.

A library is built for a level of x86 instructions, not for the machine at hand, so that a folder of libraries can be
built ahead (`build_ahead`) or shared by machines, each of which loads the best that it can run. Its name holds a digest
of all that decides its contents but the compiler: a machine without one can still use what another has built.

The compiler is `$CXX`, else `c++`, `g++` or `clang++`; GCC 12 or later, or clang. OpenMP is torch's own, so that the
kernels run in torch's threads.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.embedded import default_cache_dir
from server.engine.built_files import discard, is_whole, keep_newest, may_execute, publish
from server.engine.kernels.batch import LayerAttention, PagedBatch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("native")

BUILT_AHEAD = SOURCES / "built"
"""Where `build_ahead` puts libraries, inside the installed package, and `load_native` looks first."""

_FLAGS = (
    # Contraction is off so that a number is rounded the same way in every loop it may appear in: the sources say
    # themselves where they multiply and add in one.
    *("-std=gnu++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-math-errno", "-Wno-psabi"),
)
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_TIMEOUT_S = 900.0
_NUM_KEPT = 3

_load_lock = threading.Lock()
_loaded: Path | None = None


class NativeUnavailableError(RuntimeError):
    """There is no library and none can be built; the message says why. `gather_attention` serves instead."""


@dataclass(frozen=True, slots=True)
class Level:
    """A set of CPU instructions that a library may use. `needs` are names of `torch.cpu.get_capabilities()`."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


_AVX2 = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
_X86_LEVELS = (
    Level("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16"), (*_AVX512, "avx512_bf16")),
    Level("avx512", ("-march=x86-64-v4",), _AVX512),
    Level("avx2", ("-march=x86-64-v3",), _AVX2),
)
_PLAIN = Level("plain", (), ())


def all_levels() -> tuple[Level, ...]:
    """The levels of this machine's architecture, best first; the last runs on every CPU of it."""
    return (*_X86_LEVELS, _PLAIN) if platform.machine() in {"x86_64", "AMD64"} else (_PLAIN,)


def usable_levels() -> tuple[Level, ...]:
    """Those of `all_levels` that this CPU can run, best first."""
    has = torch.cpu.get_capabilities()
    return tuple(level for level in all_levels() if all(has.get(name, False) for name in level.needs))


def library_path(folder: Path, level: Level) -> Path:
    """Where the library of a level lies in a folder, whether it has been built or not."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*_FLAGS, *level.flags, torch.__version__, platform.machine(), sys.platform)).encode())
    return folder / f"promptmux-{level.name}-{digest.hexdigest()[:16]}.so"


def default_folder() -> Path:
    """`native` in the project's cache folder."""
    return default_cache_dir() / "native"


def load_native(folder: Path | None = None, *, level: Level | None = None, may_build: bool = True) -> Path:
    """Load the best library for this CPU into the process, building it first (tens of seconds) if need be.

    Looks among those built ahead and in `folder` (default `default_folder()`), where a new one is put. One that was cut
    short, or cannot be loaded, is built again, once; where the best cannot be built, a lesser level's serves. Any
    thread may call this, again and again: the first library that is loaded stays. `level` asks for that level alone.
    Returns the library's path. Raises NativeUnavailableError when there is none and none can be built, or `may_build`
    is off.
    """
    global _loaded
    with _load_lock:
        if _loaded is None:
            _loaded = _load(folder or default_folder(), usable_levels() if level is None else (level,), may_build)
            _register_shapes()
        return _loaded


def build(folder: Path | None = None, level: Level | None = None) -> Path:
    """Compile the library of a level (default: the best that this CPU can run) unless it is there, without loading it.

    It appears whole or not at all, and processes that want the same one build it once. The sources are compiled one
    after the other in child processes. Any process and thread may call this; only the waiting holds the caller up. Of
    libraries of older sources the newest few stay. Returns the library's path. Raises NativeUnavailableError when there
    is no compiler, it fails, or the folder cannot be written or must not hold code.
    """
    level = level or usable_levels()[0]
    folder = folder or default_folder()
    path = library_path(folder, level)
    if is_whole(path):
        return path
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not may_execute(folder):
            raise NativeUnavailableError(f"{folder} must not hold code (it is mounted noexec)")
        # Imported here: a process that finds its library needs no lock.
        from filelock import FileLock

        with FileLock(path.with_suffix(".lock")):
            if not is_whole(path):
                with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
                    publish(_compile(compiler, level, Path(scratch)), path)
                keep_newest(folder.glob(f"promptmux-{level.name}-*.so"), _NUM_KEPT)
    except OSError as error:
        raise NativeUnavailableError(f"the native library cannot be put into {folder}: {error}") from error
    return path


def build_ahead(folder: Path = BUILT_AHEAD) -> list[Path]:
    """Build every level of this architecture, as for an image that is to run on other machines. See `build`."""
    return [build(folder, level) for level in all_levels()]


def native_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    layer: LayerAttention,
) -> torch.Tensor:
    """Write this step's keys and values to the pool, then answer every token: see `gather_attention`.

    On CPU, in float32, bfloat16 or float16; the pools are contiguous. A token's bits depend on its own row's columns
    alone: not on the other rows of the batch or their order, on the number of threads, or on whether it is computed
    alone or within a chunk. They may differ from level to level. Needs `load_native` to have succeeded.

    Raises RuntimeError for shapes or dtypes that do not fit together, and for pages and slots outside the pool.
    """
    answers: torch.Tensor = torch.ops.promptmux.paged_attention(
        query,
        key,
        value,
        key_pages,
        value_pages,
        batch.page_table,
        batch.lengths,
        batch.query_starts,
        batch.write_slots,
        layer.scaling,
        layer.sliding_window or 0,
        layer.softcap or 0.0,
        layer.sinks,
    )
    return answers


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in {".cpp", ".h"})


def find_compiler() -> str:
    """The C++ compiler's path. Raises NativeUnavailableError when there is none."""
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise NativeUnavailableError(f"there is no C++ compiler ({named or ', '.join(_COMPILERS)}; set CXX)")


def _load(folder: Path, levels: Sequence[Level], may_build: bool) -> Path:
    """`levels` best first. Returns the path of the library that was loaded."""
    best, *lesser = levels
    reason = NativeUnavailableError(f"no native library has been built in {folder}")
    for path in _whole(folder, best):
        try:
            return _open(path)
        except NativeUnavailableError as error:
            reason = error
            logger.warning("%s", error)
            # So that it is built again, unless no library at all could be loaded from there.
            with contextlib.suppress(OSError):
                if path.parent == folder and may_execute(folder):
                    discard(path)
    if may_build:
        try:
            return _open(build(folder, best))
        except NativeUnavailableError as error:
            reason = error
    for level in lesser:
        for path in _whole(folder, level):
            with contextlib.suppress(NativeUnavailableError):
                opened = _open(path)
                logger.warning("the kernels run with %s in place of %s: %s", level.name, best.name, reason)
                return opened
    raise reason


def _whole(folder: Path, level: Level) -> list[Path]:
    """The undamaged libraries of a level, those built ahead first."""
    paths = (library_path(place, level) for place in (BUILT_AHEAD, folder))
    return [path for path in paths if is_whole(path)]


def _open(path: Path) -> Path:
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error
    return path


def _compile(compiler: str, level: Level, scratch: Path) -> Path:
    root = Path(torch.__file__).parent
    # System includes, so that warnings in torch's own headers stay out of sight.
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    flags = [*_FLAGS, *level.flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *includes]
    objects = []
    for source in _sources():
        if source.suffix == ".cpp":
            objects.append(scratch / f"{source.stem}.o")
            _run([compiler, *flags, "-c", str(source), "-o", str(objects[-1])])
    made = scratch / "library.so"
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([compiler, "-shared", "-fopenmp", *map(str, objects), *libraries, "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    try:
        # The compiler's name is the operator's ($CXX) or our own; everything else on the line is this module's.
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailableError(f"{command[0]} took more than {_BUILD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise NativeUnavailableError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")


def _register_shapes() -> None:
    """Tell torch's tracers what the operators return, and its graph passes that they do more than that."""

    def paged_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
        return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))

    for name in ("paged_attention", "attend"):
        torch.library.register_fake(f"promptmux::{name}", paged_attention)
        torch.fx.node.has_side_effect(getattr(torch.ops.promptmux, name).default)
