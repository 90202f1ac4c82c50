"""The commands that the service adds to `tuner`, by the entry-point group `tuner.commands`."""

import typer

from server.commands import database, jobs, serving, tokens

app = typer.Typer()
for _commands in (serving.app, jobs.app, database.app, tokens.app):
    app.add_typer(_commands)
