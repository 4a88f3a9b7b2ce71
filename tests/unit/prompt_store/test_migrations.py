from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import URL, inspect, text

from prompt_store import migrate
from prompt_store.database import Database
from prompt_store.errors import StorageFailed
from prompt_store.manifest import Canary
from prompt_store.models import Base
from prompt_store.store import PromptStore
from tests.unit.prompt_store.prompt_files import BACKBONE, make_config, make_file


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3")))


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_up_and_down_and_up_again(database: Database) -> None:
    for _ in range(2):
        migrate.upgrade(database.engine)
        assert tables(database) == set(Base.metadata.tables)
        assert migrate.current_revision(database.engine) == migrate.HEAD
        migrate.downgrade(database.engine, "base")
        assert tables(database) == set()
    database.close()


def test_each_step_down_and_up_keeps_what_earlier_revisions_know(database: Database) -> None:
    revisions = [script.revision for script in migrate.scripts().walk_revisions()]
    migrate.upgrade(database.engine)
    for revision in [*revisions[1:], "base"]:
        migrate.downgrade(database.engine, revision)
        migrate.upgrade(database.engine)
    assert tables(database) == set(Base.metadata.tables)
    database.close()


def test_migrations_make_what_the_models_say(database: Database) -> None:
    migrate.upgrade(database.engine)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def test_head_is_the_newest_script() -> None:
    assert migrate.scripts().get_current_head() == migrate.HEAD


def test_database_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path, backbone=BACKBONE) as store:
        store.upload("t", "task", file=make_file(), config=make_config())
        with store._database.writing() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageFailed, match="newer release"):
        PromptStore.open(tmp_path)
    database = Database(URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3")))
    assert tables(database) == set(Base.metadata.tables)
    database.close()


def test_database_of_the_previous_release_keeps_its_prompts_and_gains_what_is_new(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path, backbone=BACKBONE) as store:
        key, _ = store.create_key("t", ["write"], "label")
        before, _ = store.upload("t", "task", file=make_file(), config=make_config(), created_by=key.id)
        migrate.downgrade(store._database.engine, "0001")
    with PromptStore.open(tmp_path, backbone=BACKBONE) as store:
        after = store.get_version("t", "task", 1)
        assert after.provenance == replace(before.provenance, key_label=None, backbone_name=None)
        assert replace(after, provenance=before.provenance) == before
        assert (after.gate, after.probes_digest, store.get_task("t", "task").canary) == (None, None, None)
        store.load(store.resolve("t", "task"))
        store.upload("t", "task", file=make_file(seed=1), config=make_config())
        assert store.update_task("t", "task", canary=Canary(1, 5)).canary == Canary(1, 5)
        assert store.verify_key("wrong") is None


def test_durability_settings_are_in_force(database: Database) -> None:
    with database.engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    database.close()


def test_schema_is_understood_by_postgresql() -> None:
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.schema import CreateTable

    for table in Base.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))
