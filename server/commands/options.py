"""Options that several commands have."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError as UnreadableError

from server.db import Database, is_current, upgrade
from server.errors import SettingsError
from server.settings import Settings

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Where the service is: ACCUTUNE_URL, else http://127.0.0.1:8765.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="A job's id, or enough of its end (or beginning).")
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Where the service keeps its files: ACCUTUNE_DATA_DIR, else accutune-data."),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        help="postgresql://user@host/name or sqlite:///path: ACCUTUNE_DATABASE_URL, else SQLite "
        "in the data folder."
    ),
]


def settings(**given: Any) -> Settings:
    """Return the settings of the environment, with what was given on the command line before it.

    Raises SettingsError, which names the settings that are wrong.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("; ".join(map(_wrong, error.errors()))) from error
    except UnreadableError as error:  # of pydantic-settings: a list that is no JSON
        raise SettingsError(f'{error}: give a JSON list, such as \'["0", "1"]\'') from error


def _wrong(found: ErrorDetails) -> str:
    """Return which setting is wrong and why, without what was given: it may hold a password."""
    name = ".".join(map(str, found["loc"]))
    return f"ACCUTUNE_{name.upper()}: {found['msg'].removeprefix('Value error, ')}"


@contextmanager
def opened(chosen: Settings) -> Iterator[Database]:
    """Give the database with the tables of this version; SQLite's are brought up to date here."""
    database = Database(chosen.database)
    try:
        if database.is_sqlite:
            upgrade(database)
        elif not is_current(database):
            raise SettingsError(
                "the database has no tables, or those of another version: run `tuner db upgrade`"
            )
        yield database
    finally:
        database.close()
