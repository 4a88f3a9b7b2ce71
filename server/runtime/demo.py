"""Demo prompts: a folder of trained prompts, put into the tenant `shared` when the server starts.

A task that is there already, or was deleted by someone, is left alone; a prompt that does not fit the backbone is
skipped and logged, for it must not keep a server from starting.
"""

from pathlib import Path

import structlog

from prompt_store.errors import PromptStoreError, TaskNotFound, VersionConflict
from prompt_store.names import SHARED_TENANT
from prompt_store.store import PromptStore

PROMPT_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

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
                created_by="demo",
            )
        except VersionConflict:
            # Its name is retired: the demo was deleted on purpose.
            continue
        except (PromptStoreError, OSError) as error:
            _log.warning("demo_prompt_skipped", task=task, reason=str(error))
            continue
        added.append(task)
    if added:
        _log.info("demo_prompts_added", tasks=added)
    return added


def _is_known(store: PromptStore, task: str) -> bool:
    try:
        store.get_task(SHARED_TENANT, task)
    except TaskNotFound:
        return False
    except PromptStoreError:
        # Not a task name: the upload says so.
        return False
    return True
