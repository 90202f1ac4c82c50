"""Access tokens, for admins."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response, status

from server import cursors
from server.auth import Caller, Scope, require
from server.db.models import TokenRow
from server.problems import declared
from server.routes.common import Cursor, UsesServices, cut
from server.schemas import NewToken, Page, Token, TokenRequest

router = APIRouter(prefix="/v1/tokens", tags=["tokens"])

_TokenId = Annotated[str, Path(description="The token's id.", pattern=r"^[0-9a-hjkmnp-tv-z]{26}$")]
_Admin = Annotated[Caller, Depends(require(Scope.ADMIN))]


@router.post(
    "",
    operation_id="create_token",
    summary="Make a token",
    status_code=status.HTTP_201_CREATED,
)
def create_token(
    body: TokenRequest, response: Response, services: UsesServices, caller: _Admin
) -> NewToken:
    """Make a token. The answer shows it once: only its SHA-256 is kept."""
    row, secret = services.tokens.create(body.name, body.scopes, body.expires_at)
    response.headers["Cache-Control"] = "no-store"
    return NewToken(**_shown(row).model_dump(), token=secret)


@router.get("", operation_id="list_tokens", summary="List tokens")
def list_tokens(
    services: UsesServices,
    caller: _Admin,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> Page[Token]:
    """Return all tokens, the newest first, with those that no longer work; never their secrets."""
    before = None if cursor is None else cursors.decode("tokens", cursor)
    rows, last = cut(services.tokens.list(limit + 1, before), limit)
    following = None if last is None else cursors.encode("tokens", last.id)
    return Page[Token](items=[_shown(row) for row in rows], next_cursor=following)


@router.delete(
    "/{token_id}",
    operation_id="revoke_token",
    summary="Revoke a token",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=declared(404),
)
def revoke_token(token_id: _TokenId, services: UsesServices, caller: _Admin) -> None:
    """End a token and the sessions that it opened; jobs that it submitted go on."""
    services.tokens.revoke(token_id)


def _shown(row: TokenRow) -> Token:
    times: dict[str, datetime | None] = {
        name: getattr(row, name) for name in ("expires_at", "revoked_at", "last_used_at")
    }
    scopes = [Scope(scope) for scope in row.scopes]
    return Token(id=row.id, name=row.name, scopes=scopes, created_at=row.created_at, **times)
