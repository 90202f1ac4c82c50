"""Names and errors are shown on a terminal as they are: no markup, nothing that controls it."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from server import views
from server.auth import Scope
from server.commands import tables
from server.db import Database
from server.jobs import Jobs
from server.schemas import RecipeInfo
from server.tokens import Tokens
from tests.server.helpers import claimed, submission

ODD = r"a\[/x] [red]b[/] [/] [c]" + "\x1b[31m\\"
SEEN = ODD.replace("\x1b", " ")


def _text(table: Table) -> str:
    file = StringIO()
    Console(file=file, width=400, highlight=False).print(table)
    return file.getvalue()


def test_jobs_of_odd_names(jobs: Jobs) -> None:
    job, _ = jobs.submit(submission(recipe=ODD), ODD)
    jobs.fail(claimed(jobs), ODD)
    shown = views.job(jobs.get(job.id))
    assert _text(tables.jobs([shown])).count(SEEN) == 2
    assert _text(tables.job(shown, None)).count(SEEN) == 3


def test_tokens_of_odd_names(database: Database) -> None:
    row, _ = Tokens(database).create(ODD, [Scope.READ])
    assert SEEN in _text(tables.tokens([row]))


def test_recipes_of_odd_names() -> None:
    parameters = {"properties": {"a": {"default": ["[/x]"]}, "b": {"default": [True]}}}
    text = _text(tables.recipes([RecipeInfo(name=ODD, summary=ODD, parameters=parameters)]))
    assert text.count(SEEN) == 2
    assert 'a=["[/x]"], b=[true]' in text
