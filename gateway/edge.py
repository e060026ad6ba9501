"""The clients' edge: who they are, over what they come, how fast they may."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from laps.errors import InvalidArgument, Reason, ResourceExhausted
from laps.security.exposure import check_exposure
from laps.security.interceptor import Authenticate, by_api_key, by_nothing
from laps.security.keys import KeyFile
from laps.security.principal import EVERYBODY, Principal
from laps.security.tls import TlsFiles
from laps.settings import Settings

RETRY_AFTER_S = 1.0
"""What a tenant is told that has as many streams as it may."""


@dataclass(frozen=True)
class Edge:
    """How clients come in. Without `keys` nobody is asked for one."""

    tls: TlsFiles | None = None
    keys: KeyFile | None = None

    @classmethod
    def open(cls, settings: Settings) -> Edge:
        """Raises SettingsError for files that cannot be used, and for a port that would stand open."""
        keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
        check_exposure(settings, checks_callers=keys is not None, with_what="api_keys_file")
        return cls(TlsFiles.of_edge(settings), keys)

    @property
    def asks_for_certificates(self) -> bool:
        return self.tls is not None and bool(self.tls.authorities)

    @property
    def by_metadata(self) -> Authenticate:
        return by_nothing if self.keys is None else by_api_key(self.keys)

    def by_header(self, authorization: str) -> Principal:
        """Raises Unauthenticated for a key that is not ours."""
        return EVERYBODY if self.keys is None else self.keys.recognise(authorization)


@dataclass
class TenantLimits:
    """What each tenant may ask of this gateway. Quotas that count the pool's requests are the scheduler's."""

    now_s: Callable[[], float] = time.monotonic
    _full_at_s: dict[str, float] = field(default_factory=dict)
    """By tenant: when its bucket would be full again."""
    _streams: Counter[str] = field(default_factory=Counter)
    """Open ones by tenant."""

    @contextmanager
    def stream(self, principal: Principal) -> Iterator[None]:
        """Around one stream of the tenant. Raises ResourceExhausted when it has as many as it may."""
        tenant, most = principal.tenant, principal.quota.max_streams
        if most is not None and self._streams[tenant] >= most:
            raise ResourceExhausted(
                f"the tenant has {most} streams here, as many as it may; come back later",
                reason=Reason.STREAMS_FULL,
                retry_after_s=RETRY_AFTER_S,
                quota_subject="max_streams",
                metadata={"limit": most},
            )
        self._streams[tenant] += 1
        try:
            yield
        finally:
            self._streams[tenant] -= 1

    def check(self, principal: Principal, priority: int) -> None:
        """Counts one generation.

        Raises:
            InvalidArgument: the priority is above the tenant's ceiling.
            ResourceExhausted: it comes too soon after the ones before.
        """
        quota = principal.quota
        if quota.max_priority is not None and priority > quota.max_priority:
            raise InvalidArgument("priority", f"must be at most {quota.max_priority} for this tenant")
        if quota.requests_per_s is None:
            return
        # A bucket of one second's worth of calls, at least one; told by the instant at which it is full.
        now_s, each_s = self.now_s(), 1.0 / quota.requests_per_s
        full_at_s = max(self._full_at_s.get(principal.tenant, now_s), now_s) + each_s
        early_s = full_at_s - now_s - max(1.0, each_s)
        if early_s > 1e-9:
            raise ResourceExhausted(
                f"the tenant may send {quota.requests_per_s:g} requests a second",
                reason=Reason.RATE_EXCEEDED,
                retry_after_s=early_s,
                quota_subject="requests_per_s",
                metadata={"limit": quota.requests_per_s},
            )
        self._full_at_s[principal.tenant] = full_at_s
