"""The object store behind adapters: the few operations that we need, with our errors."""

import asyncio
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import obstore
import structlog
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from granatum.v1.errors import Unavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ObjectStore

RETRY_AFTER_S = 2.0
_PART_BYTES = 1 << 20
_MANY = 1_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """An object's bytes and what identifies this writing of them."""

    data: bytes
    version: "UpdateVersion"


@dataclass(frozen=True, slots=True)
class Listed:
    """An object's key and size in bytes."""

    key: str
    size: int


class Objects:
    """Objects by key. Every method raises Unavailable when the store is away."""

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store
        self.arrived: Callable[[], None] = lambda: None
        """Called whenever a part of a range has come."""

    def watched(self, arrived: Callable[[], None]) -> Self:
        """The same objects, which report every part of a range as soon as it has come."""
        twin = copy.copy(self)
        twin.arrived = arrived
        return twin

    @property
    def scratch(self) -> Path:
        """A local directory for files on their way into the store; it lies below TMPDIR."""
        return Path(tempfile.gettempdir())

    async def clear_scratch(self, before: float) -> None:
        """Remove what killed processes left in `scratch` before that Unix time.

        Here this does nothing: the system clears its own temporary directory.
        """

    async def get(self, key: str, known: Stored | None = None) -> Stored | None:
        """The object, or None if there is none. If it is unchanged, `known` without a transfer."""
        etag = known.version.get("e_tag") if known else None
        with translated("read", key):
            try:
                result = await obstore.get_async(
                    self._store, key, options={"if_none_match": etag} if etag else None
                )
                return Stored(bytes(await result.bytes_async()), _version(result.meta))
            except NotModifiedError:
                return known
            except FileNotFoundError:
                return None

    async def swap(self, key: str, data: bytes, known: Stored | None) -> Stored | None:
        """Write the object if it is still `known` (None: absent); return None if it is not."""
        with translated("write", key):
            try:
                result = await obstore.put_async(
                    self._store, key, data, mode=known.version if known else "create"
                )
            except (AlreadyExistsError, PreconditionError):
                return None
            return Stored(data, _version(result))

    async def put(self, key: str, data: bytes) -> None:
        """Write the object, whatever there is."""
        with translated("write", key):
            await obstore.put_async(self._store, key, data)

    async def put_file(self, key: str, path: Path) -> None:
        """Write a file's bytes in parts. Memory stays bounded; half a file is never visible."""
        with translated("write", key):
            await obstore.put_async(self._store, key, path)

    async def read_range(self, key: str, begin: int, end: int) -> bytes | None:
        """The object's bytes from `begin` to `end`, None if there is no object."""
        with translated("read", key):
            try:
                result = await obstore.get_async(self._store, key, options={"range": (begin, end)})
                parts = []
                async for part in result.stream(min_chunk_size=_PART_BYTES):
                    parts.append(part)
                    self.arrived()
                return b"".join(parts)
            except FileNotFoundError:
                return None

    async def listing(self, prefix: str) -> list[Listed]:
        """The objects whose keys begin with the path `prefix`, sorted by key."""
        with translated("list", prefix):
            metas = await obstore.list(self._store, prefix).collect_async()
        # A store may hold millions of objects. In a thread they hold up no tokens of streams.
        return await asyncio.to_thread(_sorted, metas) if len(metas) > _MANY else _sorted(metas)

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects; those that are gone already are no error."""
        for key in keys:
            with translated("delete", key), suppress(FileNotFoundError):
                await obstore.delete_async(self._store, key)


def _sorted(metas: "Sequence[ObjectMeta]") -> list[Listed]:
    return sorted((Listed(m["path"], m["size"]) for m in metas), key=lambda listed: listed.key)


def _version(meta: "ObjectMeta | PutResult") -> "UpdateVersion":
    """What identifies one writing of an object. obstore refuses parts that are None."""
    version: UpdateVersion = {}
    if meta["e_tag"] is not None:
        version["e_tag"] = meta["e_tag"]
    if meta["version"] is not None:
        version["version"] = meta["version"]
    return version


def first_line(error: BaseException) -> str:
    """An error's text without the internals that obstore appends."""
    return str(error).partition("\n")[0]


@contextmanager
def translated(verb: str, key: str) -> Iterator[None]:
    """Turn what a store raises into Unavailable."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        log.error("adapter store refuses access", verb=verb, key=key, error=first_line(error))
        raise Unavailable(
            "the adapter store refuses access: its operator must check the credentials",
            reason="STORE_ACCESS",
            retry_after_s=RETRY_AFTER_S,
        ) from error
    except (BaseError, OSError, NotImplementedError) as error:
        log.warning("adapter store failed", verb=verb, key=key, error=first_line(error))
        raise Unavailable(
            "the adapter store is away: try again",
            reason="STORE_AWAY",
            retry_after_s=RETRY_AFTER_S,
        ) from error
