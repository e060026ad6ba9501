"""The caller of a call: what it may do, whose requests it sees, and how much of the pool it may take."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field

from laps.errors import LapsError, PermissionDenied, Unauthenticated
from laps.security.access import Role, roles_of

TENANT_SEPARATOR = ":"
"""Between a tenant's name and the request's id in what is stored. Neither may contain it."""
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

_NAMED_ID = re.compile(r"^\S+(?= (?:needs|is past) )|\b[a-z0-9-]+:[A-Za-z0-9._-]+")
"""Where a policy names the request that goes before another; ids of tenants anywhere."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have. None: as much as the pool lets everybody have."""

    max_queued_requests: int | None = None
    """Unfinished requests, in the whole pool."""
    max_queued_tokens: int | None = None
    """Prompt tokens and output bounds of those."""
    requests_per_s: float | None = None
    """In the mean, at each gateway; a burst of one second's worth is let through."""
    max_priority: int | None = None
    max_streams: int | None = None
    """Open at a time, at each gateway. What a gateway has of them is everybody's."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `tenant` is empty for who belongs to none."""

    name: str
    roles: frozenset[Role] = frozenset()
    tenant: str = ""
    quota: Quota = field(default_factory=Quota)

    def check(self, method: str) -> None:
        """Raises Unauthenticated or PermissionDenied when it may not call the method or route."""
        allowed = roles_of(method)
        if Role.ANYONE in allowed or allowed & self.roles:
            return
        if not self.roles:
            raise Unauthenticated("this needs credentials: send an API key as 'authorization: Bearer KEY'")
        raise PermissionDenied(f"{self.name} may not call {method}")

    def stored_id(self, request_id: str) -> str:
        """A request's id in the pool: ids of different tenants never meet."""
        if not self.tenant or TENANT_SEPARATOR in request_id:
            return request_id
        return f"{self.tenant}{TENANT_SEPARATOR}{request_id}"

    def shown_id(self, stored_id: str) -> str:
        """The inverse of `stored_id`."""
        return stored_id.removeprefix(f"{self.tenant}{TENANT_SEPARATOR}") if self.tenant else stored_id

    def shown_reason(self, reason: str) -> str:
        """Why something became of this caller's request, without others' ids."""
        if Role.OPERATOR in self.roles:
            return reason
        return _NAMED_ID.sub(lambda found: self._shown_name(found[0]), reason)

    def _shown_name(self, stored_id: str) -> str:
        own = bool(self.tenant) and stored_id.startswith(f"{self.tenant}{TENANT_SEPARATOR}")
        return self.shown_id(stored_id) if own else "another request"

    def shown_error(self, error: LapsError) -> LapsError:
        """The error with its own ids as this caller knows them."""
        if self.tenant:
            prefix = f"{self.tenant}{TENANT_SEPARATOR}"
            error.message = error.message.replace(prefix, "")
            error.resource_name = error.resource_name.removeprefix(prefix)
            error.metadata = {key: value.removeprefix(prefix) for key, value in error.metadata.items()}
        return error


EVERYBODY = Principal("everybody", frozenset(Role))
"""Who calls a service that checks nobody."""
NOBODY = Principal("nobody")
"""Who shows no credentials to a service that checks them."""

_caller: ContextVar[Principal] = ContextVar("caller", default=EVERYBODY)


def caller() -> Principal:
    """Who made the call that the current task serves."""
    return _caller.get()


def set_caller(principal: Principal) -> None:
    """For the rest of the current task."""
    _caller.set(principal)
