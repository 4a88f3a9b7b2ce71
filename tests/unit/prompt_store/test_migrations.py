from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, inspect, text

from prompt_store import migrate
from prompt_store.availability import Availability
from prompt_store.database import Database
from prompt_store.errors import StorageFailed
from prompt_store.location import Location, parse_store_url
from prompt_store.manifest import Canary, Quota
from prompt_store.models import Base
from prompt_store.postgresql import PostgresDatabase
from prompt_store.shared_models import SharedBase
from prompt_store.sqlite import SqliteDatabase
from prompt_store.store import PromptStore
from tests.postgresql import PostgresServer
from tests.unit.prompt_store.prompt_files import BACKBONE, make_config, make_file


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind in turn."""
    made: Database
    if request.param == "sqlite":
        made = SqliteDatabase(tmp_path / "catalog.sqlite3")
        yield made
        made.close()
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    with server.database() as url:
        made = PostgresDatabase(parse_store_url(url), Availability(max_stale_s=0))
        yield made
        made.close()


def metadata_of(database: Database) -> list[MetaData]:
    shared = [SharedBase.metadata] if isinstance(database, PostgresDatabase) else []
    return [Base.metadata, *shared]


def models_of(database: Database) -> set[str]:
    return {name for metadata in metadata_of(database) for name in metadata.tables}


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_up_and_down_and_up_again(database: Database) -> None:
    for _ in range(2):
        migrate.upgrade(database.engine)
        assert tables(database) == models_of(database)
        assert migrate.current_revision(database.engine) == migrate.HEAD
        migrate.downgrade(database.engine, "base")
        assert tables(database) == set()


def rows(database: Database) -> dict[str, list[str]]:
    """All that is stored, by table."""
    with database.engine.connect() as connection:
        return {
            table: sorted(str(row) for row in connection.execute(text(f"SELECT * FROM {table}")))
            for table in tables(database)
        }


def test_each_step_down_and_up_keeps_what_earlier_revisions_know(location: Location) -> None:
    revisions = [script.revision for script in migrate.scripts().walk_revisions()]
    # Nobody follows a log that comes and goes.
    with PromptStore.open(location, backbone=BACKBONE, exclusive=False) as store:
        _, secret = store.create_key("t", ["write"], "label")
        store.set_quota(Quota(tenant="t", max_prompts=9))
        for seed in (1, 2):
            store.upload("t", "task", file=make_file(seed=seed), config=make_config())
        store.upload("shared", "b-task", file=make_file(seed=1), config=make_config())
        store.add_training_file("t", b"{}", filename="a.jsonl", num_examples=1)
        database = store._database
        for revision in revisions[1:]:
            migrate.downgrade(database.engine, revision)
            known = rows(database)
            assert len(known["versions"]) == 3
            assert len(known["keys"]) == 1
            migrate.upgrade(database.engine)
            assert tables(database) == models_of(database)
            migrate.downgrade(database.engine, revision)
            assert rows(database) == known
            migrate.upgrade(database.engine)
            assert store.get_task("t", "task").active_version == 2
            assert store.verify_key(secret) is not None
        migrate.downgrade(database.engine, "base")
        assert tables(database) == set()


def test_blobs_and_the_log_of_changes_outlive_a_step_that_is_not_theirs(url: str) -> None:
    with PromptStore.open(url, backbone=BACKBONE) as store:
        version, _ = store.upload("t", "task", file=make_file(), config=make_config())
        migrate.downgrade(store._database.engine, "0003")
    with PromptStore.open(url, backbone=BACKBONE) as store:
        assert store.health().position == 1
        store.load(version)
        store.check_invariants()


def test_migrations_make_what_the_models_say(database: Database) -> None:
    migrate.upgrade(database.engine)
    with database.engine.connect() as connection:
        # PostgreSQL cannot compare JSON, which the comparison of defaults has it do.
        defaults_too = isinstance(database, SqliteDatabase)
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": defaults_too}
        )
        assert compare_metadata(context, metadata_of(database)) == []


def test_head_is_the_newest_script() -> None:
    assert migrate.scripts().get_current_head() == migrate.HEAD


def test_database_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path, backbone=BACKBONE) as store:
        store.upload("t", "task", file=make_file(), config=make_config())
        with store._database.writing() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageFailed, match="newer release"):
        PromptStore.open(tmp_path)
    database = SqliteDatabase(tmp_path / "catalog.sqlite3")
    assert tables(database) == models_of(database)
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


def test_durability_settings_are_in_force(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "catalog.sqlite3")
    with database.engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    database.close()
