"""Servers as every process of ours builds them: limits, error mapping, reflection, TLS."""

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from granatum.service.error_interceptor import ErrorInterceptor
from granatum.service.sturdy_server import sturdy_server
from granatum.v1.errors import InvalidRequest
from granatum.v1.transport import LINK_OPTIONS, MAX_MESSAGE_BYTES, Tls, refuse_plaintext

MAX_PUBLIC_BYTES = 6 << 20
"""The largest message that a stranger may send."""
_PENDING_CALLS = 1 << 16
"""The most calls that wait for their handlers to start. gRPC ends all others with a bare CANCELLED.

By default gRPC drops some calls at random above 1,000 waiting ones, and all calls above 3,000.
"""
_PENDING_S = 3600
"""How long a call may wait for its handler. gRPC's default is 30 s. Deadlines still hold."""
_OPTIONS = (
    *LINK_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", _PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
    ("grpc.server_max_unrequested_time_in_server", _PENDING_S),
    # With the probe, gRPC may buffer megabytes for each unread stream. Messages that are read
    # arrive fast without it: gRPC makes room for the whole of an awaited message.
    ("grpc.http2.bdp_probe", 0),
)


def build_server(
    services: Iterable[str],
    interceptors: Iterable[grpc.aio.ServerInterceptor] = (),
    *,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Server:
    """A server with our options, error mapping and reflection of the full service names given.

    `interceptors` run inside error mapping: what they raise is mapped too. `max_bytes` is the
    largest message that the server takes.
    """
    server = sturdy_server(
        interceptors=[ErrorInterceptor(), *interceptors],
        options=(*_OPTIONS, ("grpc.max_receive_message_length", max_bytes)),
    )
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([*services, health, reflection.SERVICE_NAME], server)
    return server


def listen(
    server: grpc.aio.Server, address: str, tls: Tls | None = None, *, insecure: bool = False
) -> int:
    """Bind `host:port` (port 0: any free one) and return the port.

    Raises InvalidRequest for plaintext beyond this machine, and for what cannot be bound.
    """
    if tls is None:
        refuse_plaintext(address, insecure)
    try:
        if tls is not None:
            return server.add_secure_port(address, tls.server_credentials())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidRequest(
            f"cannot listen on {address}: the port may be taken, the host not this machine's, "
            "or the TLS files no PEM certificate with its key"
        ) from error
