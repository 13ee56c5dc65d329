"""What one router carries at a time, in all and for each tenant."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from granatum.v1.errors import RETRY_AFTER_S, Overloaded


@dataclass(frozen=True, slots=True)
class CallBounds:
    """The most that a router carries at a time."""

    streams: int
    streams_per_tenant: int
    bytes_per_tenant: int
    """The bytes of one tenant's open requests."""


@dataclass(slots=True)
class _Use:
    streams: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Quotas:
    """Open streams and the bytes of their requests, counted by tenant."""

    bounds: CallBounds
    streams: int = 0
    _uses: dict[str, _Use] = field(default_factory=dict)

    def acquire(self, tenant: str, size: int) -> None:
        """Count one more stream, for a request of `size` bytes. Raises Overloaded."""
        use = self._uses.get(tenant, _Use())
        self._check(use, size)
        self._uses[tenant] = use
        self.streams += 1
        use.streams += 1
        use.bytes += size

    def release(self, tenant: str, size: int) -> None:
        """Undo one `acquire` of the same arguments."""
        use = self._uses[tenant]
        self.streams -= 1
        use.streams -= 1
        use.bytes -= size
        if not use.streams:
            del self._uses[tenant]

    @contextmanager
    def held(self, tenant: str, size: int) -> Iterator[None]:
        """Count a stream and `size` bytes for as long as the block runs. Raises as `acquire`."""
        self.acquire(tenant, size)
        try:
            yield
        finally:
            self.release(tenant, size)

    def _check(self, use: _Use, size: int) -> None:
        bounds = self.bounds
        if use.streams >= bounds.streams_per_tenant:
            raise _over(
                "TENANT_STREAMS",
                f"this tenant has {bounds.streams_per_tenant:,} open streams on this router, the "
                "most it may have (--max-streams-per-tenant): try again when one has ended",
            )
        if use.streams and use.bytes + size > bounds.bytes_per_tenant:
            raise _over(
                "TENANT_BYTES",
                f"this tenant's open requests on this router would exceed "
                f"{bounds.bytes_per_tenant:,} bytes (--max-request-bytes-per-tenant): try again "
                "when one has ended",
            )
        if self.streams >= bounds.streams:
            raise _over(
                "ROUTER_STREAMS",
                f"this router has {bounds.streams:,} open streams, the most it carries "
                "(--max-streams): try again later, or another router",
            )


def _over(reason: str, message: str) -> Overloaded:
    return Overloaded(message, reason=reason, retry_after_s=RETRY_AFTER_S)
