"""Demo prompts: a folder of trained prompts, put into the tenant `shared` when the server starts.

A task that is there already, or was deleted by someone, is left alone; a prompt that does not fit the backbone is
skipped and logged, for it must not keep a server from starting. The labels of a task's card, where it has some, become
those of the version, among which inputs are classified.
"""

import json
from pathlib import Path
from typing import Any

import structlog

from prompt_store.errors import PromptStoreError, TaskNotFound, VersionConflict
from prompt_store.names import SHARED_TENANT
from prompt_store.store import PromptStore
from server.runtime.classification import LABELS_KEY

PROMPT_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "card.json"

_log = structlog.get_logger("promptmux.demo")


def load_demo_prompts(store: PromptStore, folder: Path) -> list[str]:
    """Uploads each `<folder>/<task>/` that is absent, and activates it; returns the tasks that are new. Blocking."""
    added: list[str] = []
    for directory in sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}")):
        task = directory.name
        if _is_known(store, task):
            continue
        try:
            store.upload(
                SHARED_TENANT,
                task,
                file=(directory / PROMPT_FILE).read_bytes(),
                config=(directory / CONFIG_FILE).read_bytes(),
                activate=True,
                expected_version=0,
                metadata=_metadata(directory / CARD_FILE),
                created_by="demo",
            )
        except VersionConflict:
            # Its name is retired: the demo was deleted on purpose.
            continue
        except (PromptStoreError, OSError, ValueError) as error:
            _log.warning("demo_prompt_skipped", task=task, reason=str(error))
            continue
        added.append(task)
    if added:
        _log.info("demo_prompts_added", tasks=added)
    return added


def _metadata(card: Path) -> dict[str, Any]:
    """Raises ValueError for a card that is no JSON object."""
    if not card.is_file():
        return {}
    fields = json.loads(card.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{card} is no JSON object")
    labels = fields.get(LABELS_KEY)
    return {LABELS_KEY: labels} if labels else {}


def _is_known(store: PromptStore, task: str) -> bool:
    try:
        store.get_task(SHARED_TENANT, task)
    except TaskNotFound:
        return False
    except PromptStoreError:
        # Not a task name: the upload says so.
        return False
    return True
