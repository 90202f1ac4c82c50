"""tuner db: the tables of the service."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from server.commands.options import DatabaseUrl, DataDir, settings
from server.commands.outcome import reported
from server.commands.tables import out
from server.db import Database, is_current, revision, upgrade
from tuner.cli import MISSED_GOAL

app = typer.Typer(name="db", help="Bring the service's database up to date.", no_args_is_help=True)


@app.command("upgrade")
@reported
def upgrade_command(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Make the tables, or bring them to this version; nothing is lost."""
    with _database(data_dir, database_url) as database:
        before = revision(database)
        upgrade(database)
        after = revision(database)
        change = f"was {after} already" if before == after else f"is {after}, was {before}"
        out.print(f"The database {change}.")


@app.command("current")
@reported
def current_command(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Show the version of the tables; exit code 1 if it is not the one of this program."""
    with _database(data_dir, database_url) as database:
        is_new = is_current(database)
        advice = "the newest" if is_new else "run `tuner db upgrade`"
        out.print(f"{revision(database)} ({advice})")
    if not is_new:
        raise typer.Exit(MISSED_GOAL)


@contextmanager
def _database(data_dir: DataDir, database_url: DatabaseUrl) -> Iterator[Database]:
    database = Database(settings(data_dir=data_dir, database_url=database_url).database)
    try:
        yield database
    finally:
        database.close()
