"""How our processes speak gRPC: options of channels and servers, and TLS.

Every server is built by `build_server` and every channel by `open_channel`, so that limits,
keepalive, TLS, health, reflection and error mapping are the same on every hop.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from granatum.v1.error_interceptor import ErrorInterceptor
from granatum.v1.errors import InvalidRequest
from granatum.v1.server import sturdy_server

MAX_MESSAGE_BYTES = 16 << 20
"""Between router and runner, where a message carries a request and all that was generated for it,
or one step of all sequences."""
MAX_PUBLIC_BYTES = 6 << 20
"""From a stranger."""
_PENDING_CALLS = 1 << 16
"""Calls that wait for their handlers to start. gRPC ends all others with a bare CANCELLED.

By itself gRPC drops some at random above 1,000 waiting calls, and all above 3,000.
"""
_PENDING_S = 3600
"""How long they may wait; by itself gRPC allows 30 s. Their deadlines still hold."""
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else 60 s, whatever the keepalive's timeout
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
_SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", _PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
    ("grpc.server_max_unrequested_time_in_server", _PENDING_S),
    # Else a fast link may fill megabytes of every stream that nobody reads. What is read still
    # comes fast: gRPC makes room for the whole of a message that somebody waits for.
    ("grpc.http2.bdp_probe", 0),
)
_CHANNEL_OPTIONS = (
    *_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. A server needs `cert` and `key`; with `ca` it demands client certificates.

    A client needs `ca`, and `cert` with `key` where the server demands one.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidRequest("TLS needs a certificate and its key together: give both or none")

    @classmethod
    def given(cls, cert: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
        """TLS with these files; None if there is none of them."""
        return cls(cert, key, ca) if cert or key or ca else None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a listening port; mutual TLS if `ca` is given."""
        if self.cert is None or self.key is None:
            raise InvalidRequest("a TLS server needs a certificate and a key")
        pair = (_read(self.key), _read(self.cert))
        ca = _read(self.ca) if self.ca else None
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of an outgoing channel."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca) if self.ca else None,
            private_key=_read(self.key) if self.key else None,
            certificate_chain=_read(self.cert) if self.cert else None,
        )

    def check_channel(self) -> None:
        """Raise InvalidRequest unless channels can be opened with these files.

        gRPC itself does not say what is wrong with them: its connections just fail.
        """
        for file in filter(None, (self.ca, self.cert, self.key)):
            _read(file)
        context = ssl.create_default_context()
        if self.ca:
            with _pem(f"{self.ca} holds no PEM certificates"):
                context.load_verify_locations(self.ca)
        if self.cert:
            with _pem(f"{self.cert} and {self.key} are no PEM certificate with its plain key"):
                context.load_cert_chain(self.cert, self.key, password="")


@contextmanager
def _pem(wrong: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequest(wrong) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read as a PEM file: {error.strerror}") from error


def is_loopback(address: str) -> bool:
    """Whether `host:port` can be reached from this machine alone."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost" or address.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(
    address: str, tls: Tls | None = None, *, insecure: bool = False
) -> grpc.aio.Channel:
    """A channel to `host:port`; in plaintext only to loopback, or where `insecure` asks for it."""
    if tls is not None:
        return grpc.aio.secure_channel(address, tls.channel_credentials(), options=_CHANNEL_OPTIONS)
    _refuse_plaintext(address, insecure)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def build_server(
    services: Iterable[str],
    interceptors: Iterable[grpc.aio.ServerInterceptor] = (),
    *,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Server:
    """A server with our options, error mapping and reflection of the full service names given.

    `interceptors` run inside error mapping: what they raise is mapped too. `max_bytes` is the
    largest message it takes.
    """
    server = sturdy_server(
        interceptors=[ErrorInterceptor(), *interceptors],
        options=(*_SERVER_OPTIONS, ("grpc.max_receive_message_length", max_bytes)),
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
        _refuse_plaintext(address, insecure)
    try:
        if tls is not None:
            return server.add_secure_port(address, tls.server_credentials())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidRequest(
            f"cannot listen on {address}: the port may be taken, the host not this machine's, "
            "or the TLS files no PEM certificate with its key"
        ) from error


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries `key`."""
    return (("authorization", f"Bearer {key}"),)


def bearer_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The key in a call's metadata, if there is one."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.partition(" ")
            return key.strip() if scheme.lower() == "bearer" and key.strip() else None
    return None


def _refuse_plaintext(address: str, insecure: bool) -> None:
    if not insecure and not is_loopback(address):
        raise InvalidRequest(
            f"{address} is beyond this machine and no TLS is configured: "
            "give certificates, or ask for plaintext by name (--insecure)"
        )
