"""The state that a killed run goes on from: one safetensors file, which is there whole or not at all.

Written to a temporary name, brought to the disk, renamed (Pillai et al. 2014 on why in this order). Numbers are kept
as tensors or as JSON in the file's header, both exactly. Refuses to know what they mean.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tuning.methods.base import sync
from tuning.records import RunStateError

# No task is called so: the finished ones have their folders beside it.
STATE_FILE = ".run_state.safetensors"
FORMAT = 1
_SEPARATOR = "/"


@dataclass(slots=True)
class TaskState:
    """One task's tensors and plain facts."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, tasks: dict[str, TaskState]) -> None:
    """Replace the folder's state. Task names hold no slash."""
    tensors = {
        f"{name}{_SEPARATOR}{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, task in tasks.items()
        for key, tensor in task.tensors.items()
    }
    facts = {"format": FORMAT, "tasks": {name: task.facts for name, task in tasks.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE_FILE}.{os.getpid()}"
    try:
        # Not by the library's own writing, whose errors of the disk are no OSError.
        temporary.write_bytes(save(tensors, metadata={"state": json.dumps(facts)}))
        sync(temporary)
        temporary.replace(folder / STATE_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    sync(folder)


def load_state(folder: Path) -> dict[str, TaskState]:
    """The folder's state, empty where there is none. Raises RunStateError for a file that is not one."""
    path = folder / STATE_FILE
    for leftover in folder.glob(f".{STATE_FILE}.*"):
        leftover.unlink(missing_ok=True)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["state"])
            tasks = {name: TaskState(facts=found) for name, found in facts["tasks"].items()}
            number = facts["format"]
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                name, _, rest = key.partition(_SEPARATOR)
                tasks[name].tensors[rest] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunStateError(f"{path} is no state of a run ({type(error).__name__}: {error}); remove it") from error
    if number != FORMAT:
        raise RunStateError(f"{path} was written by another version of promptmux; remove it to train from the start")
    return tasks
