"""The store needs no driver of PostgreSQL until a database of it is opened."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
SCRIPT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("psycopg", "psycopg_binary", "psycopg2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import prompt_store.store, prompt_store.transfer, server.cli, server.runtime.parts
from prompt_store.errors import StorageFailed
try:
    prompt_store.store.PromptStore.open("postgresql://host/db")
except StorageFailed as error:
    print(error)
"""


def test_everything_is_imported_without_it_and_a_database_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'promptmux[postgres]'" in done.stdout
