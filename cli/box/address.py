"""The addresses that a box listens on. They are proven free before any process starts."""

import errno
import socket

from granatum.v1.errors import InvalidRequest, PreconditionFailed


def claim(address: str) -> str:
    """The address, which is free to listen on now; port 0 is replaced by a free one.

    Raises PreconditionFailed if another process listens there, InvalidRequest if nobody could.
    """
    host, port = _parse(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidRequest(
            f"{address} cannot be listened on: {host} is no name of this machine"
        ) from error
    # A name such as localhost has several addresses. All must be free: else clients might reach
    # another service on one of them.
    bound = [_bind(address, family, place) for family, _, _, _, place in found]
    free = next((number for number in bound if number is not None), None)
    if free is None:
        raise InvalidRequest(f"{address} is no address of this machine: give --listen one that is")
    return f"{address.rpartition(':')[0]}:{free}"


def _parse(address: str) -> tuple[str | None, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{address!r} is no host:port: listen on one such as 127.0.0.1:7070")
    return host.strip("[]") or None, int(port)


def _bind(address: str, family: int, place: tuple[object, ...]) -> int | None:
    """Bind the address for a moment; return its port, or None if this machine lacks the address."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(place)
            probe.listen(1)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PreconditionFailed(
                f"{address} is taken by another process: stop that one, "
                "or choose another address with --listen host:port"
            ) from error
        if error.errno == errno.EACCES:
            raise InvalidRequest(
                f"{address} may not be listened on by this user: choose a port above 1023"
            ) from error
        return None
