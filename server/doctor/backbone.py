"""The backbone: found, of a kind that can be served, and small enough for this machine's memory with all pools."""

import json
from collections.abc import Iterator
from pathlib import Path

from server.doctor.findings import Finding, size_text
from server.embedded import EmbeddedBackboneError, embedded_gguf, find_converted
from server.settings import Settings

_WEIGHTS = "*.safetensors"
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What torch, the tokenizer and the rest of the process take.
_PROCESS_BYTES = 1024**3


def check_backbone(settings: Settings) -> Iterator[Finding]:
    """Where its files are; then whether memory suffices for them and the pools."""
    folder = None
    if settings.model is None or settings.model.endswith(".gguf"):
        source = _gguf(settings)
        if isinstance(source, Finding):
            yield source
            return
        folder = find_converted(source, settings.cache_dir)
        if folder is None:
            detail = f"{source.name} is converted at the first start (about 20 seconds for the embedded one)"
            yield Finding("backbone", "ok", detail, "`promptmux backbone` converts the embedded one now")
            return
        yield Finding("backbone", "ok", f"{source.name}, converted in {folder}")
    else:
        found = Path(settings.model).expanduser()
        if not found.is_dir():
            yield _not_a_folder(settings.model, found)
            return
        finding = _look_into(found)
        yield finding
        if finding.status == "wrong":
            return
        folder = found
    yield from _check_memory(settings, folder)


def _gguf(settings: Settings) -> Path | Finding:
    try:
        path = embedded_gguf() if settings.model is None else Path(settings.model).expanduser()
    except EmbeddedBackboneError as error:
        return Finding("backbone", "wrong", str(error).splitlines()[0], " ".join(str(error).split()))
    if not path.is_file():
        return Finding("backbone", "wrong", f"{path} does not exist", "name a model folder, a hub id or a GGUF file")
    return path


def _not_a_folder(model: str, path: Path) -> Finding:
    if path.exists() or model.startswith((".", "/", "~")):
        advice = "name a model folder, a hub id or a GGUF file"
        return Finding("backbone", "wrong", f"{model} is not a model folder", advice)
    return Finding("backbone", "ok", f"{model} is taken for a hub id, and is fetched at the first start")


def _look_into(folder: Path) -> Finding:
    from server.engine.checkpoint import BackboneError, refuse_shipped_code

    try:
        refuse_shipped_code(folder)
    except BackboneError as error:
        return Finding("backbone", "wrong", str(error), "use a model that transformers knows without code of its own")
    if not any(folder.glob(_WEIGHTS)):
        advice = "save it with save_pretrained: only safetensors files are read"
        return Finding("backbone", "wrong", f"{folder} has no safetensors file", advice)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        return Finding("backbone", "wrong", f"{folder} is an encoder-decoder model ({kind})", "use a decoder-only one")
    return Finding("backbone", "ok", f"{folder} ({kind})")


def _check_memory(settings: Settings, folder: Path) -> Iterator[Finding]:
    from server.engine.checkpoint import choose_device, choose_dtype
    from server.engine.host_memory import available_bytes
    from server.engine.memory import default_kv_bytes

    device = choose_device(settings.device)
    dtype = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    on_disk = sum(file.stat().st_size for file in folder.glob(_WEIGHTS))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved_as = config.get("dtype") or config.get("torch_dtype") or "float32"
    weights = on_disk * _DTYPE_BYTES.get(dtype, 4) // _DTYPE_BYTES.get(str(saved_as), 4)
    rows = settings.kv_cache_bytes
    if rows is None:
        rows = default_kv_bytes(device, settings.prefix_cache_bytes)
    pools = {"weights": weights, "rows": rows, "prefixes": settings.prefix_cache_bytes}
    if device.type == "cuda":
        import torch

        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        pools |= {"prompts on the host": settings.host_prompt_bytes, "the process": _PROCESS_BYTES}
        free = available_bytes()
    needed = sum(pools.values())
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in pools.items())
    if free is None:
        yield Finding("memory", "ok", f"up to {size_text(needed)} needed ({parts}); what is free is not known here")
    elif needed > free:
        advice = "lower --kv-cache-bytes or --prefix-cache-bytes, or use a smaller backbone"
        detail = f"up to {size_text(needed)} needed ({parts}), {size_text(free)} free"
        yield Finding("memory", "wrong" if weights > free else "slow", detail, advice)
    else:
        yield Finding("memory", "ok", f"up to {size_text(needed)} needed ({parts}), {size_text(free)} free")
