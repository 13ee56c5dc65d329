"""How our clients reach our servers: channels, TLS, bearer keys, and where plaintext is allowed.

Every channel is opened by `open_channel`, so that limits, keepalive and TLS are the same on every
hop. Servers share LINK_OPTIONS.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from granatum.v1.errors import InvalidRequest

MAX_MESSAGE_BYTES = 16 << 20
"""The largest message between router and runner. It carries a request and all tokens generated for
the request, or one step of all sequences."""
LINK_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the default is 60 s, whatever the keepalive's timeout
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
"""Options of both ends of a connection."""
_CHANNEL_OPTIONS = (
    *LINK_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_ANY_HOST = ("", "0.0.0.0", "::", "*")  # noqa: S104 - recognised, not bound


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


def reachable(address: str) -> str:
    """The address by which other machines reach a service that listens on `host:port`."""
    host, port = address.rpartition(":")[::2]
    return f"{socket.gethostname() if host.strip('[]') in _ANY_HOST else host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `host:port`."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost" or address.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_plaintext(address: str, insecure: bool) -> None:
    """Raise InvalidRequest unless `host:port` is on loopback or plaintext is asked for by name."""
    if not insecure and not is_loopback(address):
        raise InvalidRequest(
            f"{address} is beyond this machine and no TLS is configured: "
            "give certificates, or ask for plaintext by name (--insecure)"
        )


def open_channel(
    address: str, tls: Tls | None = None, *, insecure: bool = False
) -> grpc.aio.Channel:
    """A channel to `host:port`.

    Plaintext needs a loopback address or `insecure`; else InvalidRequest.
    """
    if tls is not None:
        return grpc.aio.secure_channel(address, tls.channel_credentials(), options=_CHANNEL_OPTIONS)
    refuse_plaintext(address, insecure)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


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
