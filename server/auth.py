"""Who calls, and what that caller may do."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from fastapi import Request

from server.errors import ForbiddenError


class Scope(StrEnum):
    """What a token allows; a later one includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


_INCLUDED = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.SUBMIT: frozenset({Scope.READ, Scope.SUBMIT}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True)
class Caller:
    """Someone whose token was checked, or the one user of a service on this machine alone.

    Jobs that the caller submits are owned by `owner`.
    """

    owner: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Return whether one of the caller's scopes includes this one."""
        return any(scope in _INCLUDED[own] for own in self.scopes)


LOCAL = Caller("local", frozenset({Scope.ADMIN}))


def require(scope: Scope) -> Callable[[Request], Caller]:
    """Return the dependency of a route that needs this scope; it gives the caller.

    The caller was found before, by the dependency that holds for the whole application.
    """

    def allowed(request: Request) -> Caller:
        caller: Caller = request.state.caller
        if not caller.may(scope):
            raise ForbiddenError(f"this needs a token with the scope {scope}")
        return caller

    return allowed
