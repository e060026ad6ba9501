"""No service stands open to a network by accident."""

from __future__ import annotations

from laps.setting import SettingsError, is_loopback
from laps.settings import Settings


def check_exposure(settings: Settings, *, checks_callers: bool, with_what: str) -> None:
    """Raises SettingsError when callers from other hosts would be served without being asked who they are."""
    if checks_callers or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise SettingsError(
        f"host: {settings.host} is reached by other hosts, and nobody is asked who he is: set {with_what}, "
        f"or allow_unauthenticated=true where the network keeps others out (from {settings.origin('host')})"
    )
