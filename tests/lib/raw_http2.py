"""HTTP/2 by hand, for what no gRPC client would send."""

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
_FRAME_BYTES = 16_384
_WINDOW = 65_535


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = struct.pack(">I", len(payload))[1:]
    return size + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def block(headers: Mapping[bytes, bytes]) -> bytes:
    """Headers, none of them compressed."""
    fields = [
        bytes([0, len(name)]) + name + bytes([len(value)]) + value
        for name, value in headers.items()
    ]
    return b"".join(fields)


def grpc_headers(path: bytes, key: str | None = None) -> dict[bytes, bytes]:
    """Of a gRPC call."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return headers if key is None else headers | {b"authorization": f"Bearer {key}".encode()}


def message(data: bytes) -> bytes:
    """As gRPC frames it within a stream."""
    return b"\0" + struct.pack(">I", len(data)) + data


@asynccontextmanager
async def deaf_watcher(port: int, path: bytes, request: bytes = b"") -> AsyncIterator[None]:
    """A call whose client has room for no byte of any answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
    writer.write(frame(HEADERS, END_HEADERS, 1, block(grpc_headers(path))))
    writer.write(frame(DATA, END_STREAM, 1, message(request)))
    await writer.drain()
    try:
        yield
    finally:
        writer.close()


class Unfinished:
    """A connection with calls that each send a message but for its last byte, as far as they may.

    `sent` is how many bytes the server let them send.
    """

    def __init__(self, port: int, path: bytes, key: str | None, calls: int, size: int) -> None:
        self._port = port
        self._headers = block(grpc_headers(path, key))
        self._size = size
        self._left = dict.fromkeys(range(1, 2 * calls, 2), size - 1)
        self._windows = dict.fromkeys(self._left, _WINDOW)
        self._initial = self._window = _WINDOW
        self.sent = 0

    async def run(self) -> None:
        """Send until the server closes the connection, or until cancelled."""
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
        for stream in self._left:
            self._writer.write(frame(HEADERS, END_HEADERS, stream, self._headers))
            self._send(stream, b"\0" + struct.pack(">I", self._size))
        try:
            while True:
                await self._fill()
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writer.close()

    def _send(self, stream: int, data: bytes) -> None:
        self._writer.write(frame(DATA, 0, stream, data))
        self._windows[stream] -= len(data)
        self._window -= len(data)
        self.sent += len(data)

    async def _fill(self) -> None:
        for stream in self._left:
            while (room := min(_FRAME_BYTES, self._left[stream], self._room(stream))) > 0:
                self._left[stream] -= room
                self._send(stream, bytes(room))
        await self._writer.drain()

    def _room(self, stream: int) -> int:
        return min(self._windows[stream], self._window)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE and not stream:
            self._window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE and stream in self._windows:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            self._heed(dict(struct.iter_unpack(">HI", payload)))
            self._writer.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))

    def _heed(self, settings: dict[int, int]) -> None:
        initial = settings.get(INITIAL_WINDOW_SIZE, self._initial)
        for stream in self._windows:
            self._windows[stream] += initial - self._initial
        self._initial = initial
