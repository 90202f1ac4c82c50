"""The dashboard's sessions: a signed cookie that stands for a token, and its CSRF token."""

import hashlib
import hmac
import os
import secrets
import time
from functools import cached_property
from pathlib import Path

from starlette.responses import Response

from server.auth import SESSION_COOKIE, Caller
from server.errors import SettingsError
from server.settings import Settings
from server.tokens import Tokens

_KEY_BYTES = 32
_LONGEST_VALUE = 256


class Sessions:
    """Sessions live in their cookies: `ses_<token id>.<end>.<nonce>.<signature>`.

    A session ends at its own end, when its token expires or is revoked, and when the key in the
    data folder changes.
    """

    def __init__(self, settings: Settings, tokens: Tokens) -> None:
        self._key_file = settings.data_dir / "session.key"
        self._lasts_s = round(settings.session_hours * 3600)
        self._tokens = tokens

    def login(self, response: Response, secret: str, secure: bool) -> Caller | None:
        """Open a session by a token; return None, and set no cookie, where it is not usable.

        `secure`: the page was asked for by https.
        """
        caller = self._tokens.find(secret)
        if caller is None or caller.token_id is None:
            return None
        self._set(response, self._new(caller.token_id), self._lasts_s, secure)
        return caller

    def logout(self, response: Response, secure: bool) -> None:
        """Take the cookie back."""
        self._set(response, "", 0, secure)

    def find(self, value: str) -> Caller | None:
        """Return who has this cookie; None where the session has ended or is forged."""
        if len(value) > _LONGEST_VALUE or not value.startswith("ses_"):
            return None
        signed, _, signature = value.removeprefix("ses_").rpartition(".")
        if not _same(signature, self._sign("session", signed)):
            return None
        token_id, end, _ = signed.split(".")  # what was signed has three parts
        if int(end) <= time.time():
            return None
        return self._tokens.of_id(token_id)

    def csrf_token(self, value: str) -> str:
        """Return what a page of this session sends along with everything that changes a thing."""
        return self._sign("csrf", value)

    def is_csrf_token(self, value: str, given: str) -> bool:
        """Return whether this is the session's CSRF token."""
        return _same(given, self.csrf_token(value))

    def _new(self, token_id: str) -> str:
        end = round(time.time()) + self._lasts_s
        signed = f"{token_id}.{end}.{secrets.token_urlsafe(12)}"
        return f"ses_{signed}.{self._sign('session', signed)}"

    def _sign(self, purpose: str, text: str) -> str:
        message = f"{purpose}:{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def _set(self, response: Response, value: str, max_age_s: int, secure: bool) -> None:
        response.set_cookie(
            SESSION_COOKIE,
            value,
            max_age=max_age_s,
            httponly=True,
            samesite="strict",
            secure=secure,
        )

    @cached_property
    def _key(self) -> bytes:
        try:
            return _stored_key(self._key_file)
        except OSError as error:
            raise SettingsError(
                f"the key of the sessions, {self._key_file}, cannot be used ({error}): the service "
                "needs to own its data folder"
            ) from error


def _stored_key(path: Path) -> bytes:
    """Return the key in this file, made where there is none; several processes may do so."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(new, path)  # fails where another process was first
        except FileExistsError:
            pass
        finally:
            new.unlink()
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise OSError(f"it has {len(key)} bytes, not {_KEY_BYTES}: delete it to end all sessions")
    return key


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(
        one.encode("utf-8", "surrogateescape"), other.encode("utf-8", "surrogateescape")
    )
