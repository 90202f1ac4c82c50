"""Migrations make the tables that the models describe, wherever they start from."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from server.db import Database, is_current, upgrade
from server.db.models import Base
from server.errors import SettingsError
from tests.server.helpers import HEADER, record
from tuner.storage import StudyStore


def _differences(database: Database) -> list[object]:
    with database.reading() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def test_an_empty_database_gets_all_tables(empty_url: str) -> None:
    database = Database(empty_url)
    assert not is_current(database)
    upgrade(database)
    assert is_current(database)
    tables = set(inspect(database.engine).get_table_names())
    assert tables == {*Base.metadata.tables, "alembic_version"}
    database.close()


def test_autogenerate_finds_no_difference(database: Database) -> None:
    assert _differences(database) == []


def test_a_difference_would_be_found(empty_url: str) -> None:
    database = Database(empty_url)
    upgrade(database)
    with database.writing() as session:
        session.execute(text("ALTER TABLE jobs DROP COLUMN error"))
        session.execute(text("DROP INDEX ix_jobs_owner"))
    assert len(_differences(database)) == 2
    database.close()


def test_trials_of_the_library_stay(empty_url: str) -> None:
    study = StudyStore.open(empty_url, "mine", HEADER)
    study.add(0, record(0))
    study.close()
    database = Database(empty_url)
    upgrade(database)
    assert is_current(database)
    assert _differences(database) == []
    database.close()
    again = StudyStore.open(empty_url, "mine", HEADER)
    assert again.resumed
    assert again.records() == [record(0)]
    again.close()


def test_several_may_upgrade_at_once(empty_url: str) -> None:
    databases = [Database(empty_url) for _ in range(4)]
    with ThreadPoolExecutor(len(databases)) as pool:
        list(pool.map(upgrade, databases))
    assert is_current(databases[0])
    assert _differences(databases[0]) == []
    for database in databases:
        database.close()


def test_an_upgrade_of_the_newest_changes_nothing(database: Database) -> None:
    upgrade(database)
    assert is_current(database)


def test_tables_of_a_newer_program_are_left_alone(empty_url: str) -> None:
    database = Database(empty_url)
    upgrade(database)
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SettingsError, match=r"'9999'.*newer program"):
        upgrade(database)
    assert not is_current(database)
    database.close()
