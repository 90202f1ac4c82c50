"""What must hold before the service may listen."""

from server.auth import is_loopback, needs_token
from server.errors import SettingsError
from server.settings import Settings
from server.tokens import Tokens


def check_exposure(settings: Settings, tokens: Tokens) -> None:
    """Raise SettingsError where others could reach a service that nobody guards.

    That is: `host` is not a loopback address, and tokens are off or there is no usable one.
    """
    if is_loopback(settings.host):
        return
    if not needs_token(settings):
        raise SettingsError(
            f"host {settings.host!r} can be reached from other machines, so ACCUTUNE_AUTH=false is "
            "not allowed: leave it out and make a token with `tuner token create`, or bind to "
            "127.0.0.1"
        )
    if not tokens.any_usable():
        raise SettingsError(
            f"host {settings.host!r} can be reached from other machines, and there is no usable "
            "token: make one with `tuner token create`, or bind to 127.0.0.1"
        )
