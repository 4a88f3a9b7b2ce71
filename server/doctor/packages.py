"""What is installed: torch and its device, the number format, and what training needs."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

from server.doctor.findings import Finding, size_text
from server.settings import Settings


def check_torch(settings: Settings) -> Iterator[Finding]:
    """torch, and the device and number format that a server would use."""
    import torch

    from server.engine.checkpoint import BackboneError, choose_device, choose_dtype

    transformers = importlib.metadata.version("transformers")
    yield Finding("torch", "ok", f"torch {torch.__version__}, transformers {transformers}")
    try:
        device = choose_device(settings.device)
    except BackboneError as error:
        yield Finding("device", "wrong", str(error), "--device cpu, or install the driver that this torch needs")
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield Finding("device", "ok", f"{device}: {name}, {size_text(free)} free of {size_text(total)}")
    else:
        yield Finding("device", "ok", "cpu")
    chosen = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    natural = str(choose_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cpu" and chosen != natural and chosen != "float32":
        yield Finding("dtype", "slow", f"{chosen} on a CPU that emulates it", f"--dtype {natural}")
    elif chosen == "float32" and natural != "float32":
        yield Finding("dtype", "slow", f"float32; {natural} would be faster here", "--dtype auto, unless bits matter")
    else:
        yield Finding("dtype", "ok", chosen)


def check_tuning(_: Settings) -> Iterator[Finding]:
    """PEFT is needed to train prompts, not to serve them."""
    if importlib.util.find_spec("peft") is None:
        yield Finding("peft", "ok", "not installed: prompts are served, not trained", "pip install 'promptmux[train]'")
    else:
        yield Finding("peft", "ok", f"peft {importlib.metadata.version('peft')}")
