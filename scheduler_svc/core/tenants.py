"""What the unfinished requests of each tenant come to."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler_svc.core.records import RequestSpec, TenantQuota


@dataclass(slots=True)
class _Held:
    requests: int = 0
    tokens: int = 0


class Tenants:
    """Counts by tenant, from acceptance to the end. Requests of no tenant are not counted."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def problem(self, spec: RequestSpec, quota: TenantQuota) -> str:
        """Why the tenant may not have this request as well; empty: it may."""
        held = self._held.get(spec.tenant, _Held())
        if quota.max_queued_requests is not None and held.requests >= quota.max_queued_requests:
            return f"{held.requests} requests of the tenant are unfinished, as many as it may have"
        if quota.max_queued_tokens is not None and held.tokens + _tokens(spec) > quota.max_queued_tokens:
            return (
                f"the tenant's unfinished requests have {held.tokens} tokens, this one {_tokens(spec)}; "
                f"at most {quota.max_queued_tokens} are allowed"
            )
        return ""

    def add(self, spec: RequestSpec) -> None:
        if spec.tenant:
            held = self._held.setdefault(spec.tenant, _Held())
            held.requests += 1
            held.tokens += _tokens(spec)

    def remove(self, spec: RequestSpec) -> None:
        """Of a request that was added."""
        if spec.tenant:
            held = self._held[spec.tenant]
            held.requests -= 1
            held.tokens -= _tokens(spec)
            if not held.requests:
                del self._held[spec.tenant]


def _tokens(spec: RequestSpec) -> int:
    return spec.prompt_tokens + spec.max_tokens
