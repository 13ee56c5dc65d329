"""Messages between front and engine over a socket pair: a length, then a pickle.

Both ends are our own processes, so pickles are trusted. The end of the stream means that the other
process is gone.
"""

import asyncio
import pickle
import select
import socket
import struct
from typing import Generic, TypeVar

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 18
_BUFFER_BYTES = 4 << 20

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class ChannelClosed(EOFError):
    """The other process is gone."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets with room for many messages."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return pair


class Channel(Generic[Sent, Received]):
    """The engine's end. `send` never waits: bytes that the socket does not take go out later."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def send(self, message: Sent) -> None:
        """Send one message. Raises ChannelClosed."""
        self._outgoing += _encode(message)
        self._flush()

    def receive_all(self, timeout: float) -> list[Received]:
        """All messages that have arrived; waits up to `timeout` seconds for the first.

        Raises ChannelClosed once the other process is gone and all of its messages were returned.
        """
        readable, writable = self._wait(timeout)
        if writable:
            self._flush()
        closed = readable and self._drain()
        messages = self._decode()
        if closed and not messages:
            raise ChannelClosed("the front process is gone")
        return messages

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _wait(self, timeout: float) -> tuple[bool, bool]:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        events = dict(poller.poll(timeout * 1000)).get(self._socket.fileno(), 0)
        return bool(events & ~select.POLLOUT), bool(events & select.POLLOUT)

    def _drain(self) -> bool:
        """Take in the bytes that have arrived; whether the other process is gone."""
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not data:
                return True
            self._incoming += data

    def _decode(self) -> list[Received]:
        messages, at = [], 0
        while len(self._incoming) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, at)
            end = at + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            messages.append(pickle.loads(memoryview(self._incoming)[at + _LENGTH.size : end]))  # noqa: S301
            at = end
        del self._incoming[:at]
        return messages

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed("the front process is gone") from error
        del self._outgoing[:sent]


class AsyncChannel(Generic[Sent, Received]):
    """The front's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "AsyncChannel[Sent, Received]":
        """Take over one end of a socket pair."""
        reader, writer = await asyncio.open_connection(sock=end, limit=_BUFFER_BYTES)
        return cls(reader, writer)

    def send(self, message: Sent) -> None:
        """Send one message; bytes that the socket does not take go out later.

        Does nothing if the other process is gone: `receive` tells of that.
        """
        if not self._writer.transport.is_closing():
            self._writer.write(_encode(message))

    async def receive(self) -> Received:
        """The next message. Raises ChannelClosed once the other process is gone."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            data = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the engine process is gone") from error
        message: Received = pickle.loads(data)  # noqa: S301
        return message

    def close(self) -> None:
        """Close this end; the engine then stops."""
        self._writer.close()


def _encode(message: object) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data
