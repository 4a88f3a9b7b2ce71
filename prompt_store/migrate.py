"""Brings the catalog's schema to a revision, up or down, through Alembic."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine

from prompt_store.errors import StorageFailed

_SCRIPTS = Path(__file__).parent / "migrations"

# What this release reads and writes; a test holds it equal to the newest script. Knowing it without reading the scripts
# makes the start of an up-to-date store cheap.
HEAD = "0004"


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at, None for an empty one."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: Engine) -> None:
    """Bring the database to HEAD. Raises StorageFailed when a newer release wrote it."""
    revision = current_revision(engine)
    if revision == HEAD:
        return
    try:
        _run(engine, "upgrade", HEAD)
    except CommandError as error:
        raise StorageFailed(
            f"The store's database is at revision {revision}, which this release does not know: a newer release wrote "
            "it. Use that release, or restore a backup."
        ) from error


def downgrade(engine: Engine, revision: str) -> None:
    """Take the database back to `revision` ("base" for nothing at all); data of dropped tables is lost."""
    _run(engine, "downgrade", revision)


def scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _run(engine: Engine, direction: str, revision: str) -> None:
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.upgrade if direction == "upgrade" else command.downgrade)(config, revision)
