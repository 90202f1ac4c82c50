"""tuner token: who may use the service."""

import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from server.auth import Scope
from server.commands import tables
from server.commands.options import AsJson, DatabaseUrl, DataDir, opened, settings
from server.commands.outcome import err, reported
from server.db.models import TokenRow
from server.tokens import Tokens

app = typer.Typer(name="token", help="Make, list and revoke access tokens.", no_args_is_help=True)

_DAYS = 90
_MOST_DAYS = 36_500


@app.command("create")
@reported
def create(
    name: Annotated[str, typer.Argument(help="Who gets it; owns the jobs submitted with it.")],
    scope: Annotated[
        list[Scope],
        typer.Option(help="read; submit (and read); admin (everything, of all owners)."),
    ] = [Scope.SUBMIT],  # noqa: B006 (typer shows it as the default)
    days: Annotated[
        int, typer.Option(min=0, max=_MOST_DAYS, help="Until it expires; 0: never.")
    ] = _DAYS,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a token and print it: only now, as only its hash is kept."""
    expires = datetime.now(UTC) + timedelta(days=days) if days else None
    with opened(settings(data_dir=data_dir, database_url=database_url)) as database:
        row, secret = Tokens(database).create(name, scope, expires)
    if as_json:
        tables.show_json([_described(row) | {"token": secret}])
        return
    sys.stdout.write(secret + "\n")
    until = f"until {row.expires_at:%Y-%m-%d}" if row.expires_at else "for ever"
    err.print(
        f"{', '.join(row.scopes)} {until}, id {row.id}. Keep it: it cannot be shown again. "
        "Clients take it from ACCUTUNE_TOKEN.",
        soft_wrap=True,
    )


@app.command("list")
@reported
def list_command(
    as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """List all tokens, without what they are."""
    with opened(settings(data_dir=data_dir, database_url=database_url)) as database:
        rows = Tokens(database).list()
    if as_json:
        tables.show_json(map(_described, rows))
    else:
        tables.out.print(tables.tokens(rows))


@app.command("revoke")
@reported
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `tuner token list` shows it.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """End a token at once, and the sessions opened with it."""
    with opened(settings(data_dir=data_dir, database_url=database_url)) as database:
        row = Tokens(database).revoke(token_id)
    tables.out.print(f"Revoked {row.id} of {row.name}.", markup=False)


def _described(row: TokenRow) -> dict[str, Any]:
    times = {"created_at": row.created_at, "expires_at": row.expires_at}
    times |= {"last_used_at": row.last_used_at, "revoked_at": row.revoked_at}
    shown = {name: value and value.isoformat() for name, value in times.items()}
    return {"id": row.id, "name": row.name, "scopes": row.scopes, **shown}
