"""Bring a database to the tables of this version."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from server.db.engine import Database
from server.errors import SettingsError

_FOLDER = Path(__file__).parent / "migrations"
_LOCK = 0x6163637574756E65  # of PostgreSQL: one upgrade at a time


def upgrade(database: Database, revision: str = "head") -> None:
    """Run the migrations that are missing; several processes may do so at the same time.

    Raises SettingsError for tables of a version that this program does not know.
    """
    with database.writing() as session:
        connection = session.connection()
        if not database.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        config = _config()
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
        except CommandError as error:
            raise SettingsError(
                f"the database cannot be brought to this version ({error}): where a newer program "
                "has upgraded it, use that one"
            ) from error


def is_current(database: Database) -> bool:
    """Return whether the tables are those of this version."""
    return revision(database) == ScriptDirectory.from_config(_config()).get_current_head()


def revision(database: Database) -> str | None:
    """Return the version of the tables, None where there are none."""
    with database.reading() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    return config
