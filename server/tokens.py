"""Access tokens: made, listed, revoked, and found again by what a client presents."""

import hashlib
import logging
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from server.auth import Caller, Scope
from server.db import Database
from server.db.models import TokenRow
from server.errors import DatabaseError, InvalidError, NotFoundError
from server.ids import new_id
from server.schemas import Name

PREFIX = "acc_"
_SECRET_BYTES = 32
_LONGEST_SECRET = 256
_TOUCH_EVERY = timedelta(minutes=1)
_NAME = TypeAdapter[str](Name)
_log = logging.getLogger(__name__)


class Tokens:
    """The tokens in a database. Only the SHA-256 of a token is kept, and looked up by.

    A token has 256 random bits: there is nothing to guess, so that no salt or slow hash is needed,
    and how long a lookup by digest takes tells nothing about the token.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, name: str, scopes: Sequence[Scope], expires: datetime | None = None
    ) -> tuple[TokenRow, str]:
        """Make a token; return its row and the secret, which cannot be shown again.

        Raises InvalidError for a name that cannot be stored, for a time that has passed, and for no
        scope at all.
        """
        _check_name(name)
        if not scopes:
            raise InvalidError(f"a token needs a scope: {', '.join(Scope)}")
        if expires is not None:
            expires = _in_utc(expires)
            if expires <= _now():
                raise InvalidError(f"the token would have expired at {expires.isoformat()} already")
        secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        row = TokenRow(
            id=new_id(),
            name=name,
            sha256=_digest(secret),
            scopes=[str(scope) for scope in Scope if scope in scopes],
            created_at=_now(),
            expires_at=expires,
        )
        with self._database.writing() as session:
            session.add(row)
        return row, secret

    def list(self, limit: int = 1000, before: str | None = None) -> Sequence[TokenRow]:
        """Return tokens, the newest first, that were made before the one of this id."""
        query = select(TokenRow).order_by(TokenRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(TokenRow.id < before)
        with self._database.reading() as session:
            return session.scalars(query).all()

    def revoke(self, token_id: str) -> TokenRow:
        """End a token, and with it the sessions that were opened by it."""
        with self._database.writing() as session:
            row = session.get(TokenRow, token_id)
            if row is None:
                raise NotFoundError(f"there is no token {token_id!r}")
            row.revoked_at = row.revoked_at or _now()
            return row

    def find(self, secret: str) -> Caller | None:
        """Return who presents this secret; None where no usable token has it."""
        if len(secret) > _LONGEST_SECRET:
            return None
        return self._caller(TokenRow.sha256 == _digest(secret))

    def of_id(self, token_id: str) -> Caller | None:
        """Return whose token this is; None where it is no longer usable."""
        return self._caller(TokenRow.id == token_id)

    def any_usable(self) -> bool:
        """Return whether there is a token by which someone could come in."""
        query = select(func.count()).select_from(TokenRow).where(_usable(_now()))
        with self._database.reading() as session:
            return session.scalars(query).one() > 0

    def _caller(self, which: ColumnElement[bool]) -> Caller | None:
        moment = _now()
        with self._database.reading() as session:
            row = session.scalars(select(TokenRow).where(which, _usable(moment))).one_or_none()
            if row is None:
                return None
            caller = Caller(row.name, frozenset(Scope(scope) for scope in row.scopes), row.id)
            last = row.last_used_at
        if last is None or moment - last >= _TOUCH_EVERY:
            self._touch(row.id, moment)
        return caller

    def _touch(self, token_id: str, moment: datetime) -> None:
        """Note that a token was used; that must not fail what it is used for."""
        try:
            with self._database.writing() as session:
                _set_last_used(session, token_id, moment)
        except DatabaseError as error:
            _log.warning("cannot note the use of token %s: %s", token_id, error)


def _set_last_used(session: Session, token_id: str, moment: datetime) -> None:
    stale = or_(TokenRow.last_used_at.is_(None), TokenRow.last_used_at <= moment - _TOUCH_EVERY)
    chosen = update(TokenRow).where(TokenRow.id == token_id, stale)
    session.execute(chosen.values(last_used_at=moment))


def _usable(moment: datetime) -> ColumnElement[bool]:
    lasts = or_(TokenRow.expires_at.is_(None), TokenRow.expires_at > moment)
    return and_(TokenRow.revoked_at.is_(None), lasts)


def _check_name(name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError as error:
        raise InvalidError(
            f"{name[:40]!r} is no name for a token: give 1 to 255 Unicode characters, no NUL"
        ) from error


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidError(f"{moment.isoformat()} is beyond the years that are counted") from error


def _now() -> datetime:
    return datetime.now(UTC)
