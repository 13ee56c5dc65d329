"""Adapters' bytes, by digest.

    blobs/<digest>/<epoch>/adapter_config.json
    blobs/<digest>/<epoch>/adapter_model.safetensors
    blobs/<digest>/<epoch>/chat.json                    if the adapter brings one

The epoch is the hour in which the bytes were stored. An upload refers only to bytes stored in the
upload's own hour: bytes of an earlier hour are stored again. Garbage collection deletes only bytes
of hours long past, and can never delete what an upload is about to refer to.
"""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import structlog

from granatum.adapters_store.blobs.incoming import FILES, adapter_digest
from granatum.adapters_store.blobs.strays import Strays, epoch_in
from granatum.adapters_store.chat import CHAT_FILE, MAX_CHAT_BYTES
from granatum.adapters_store.format.modules import CONFIG_FILE
from granatum.adapters_store.format.safetensors_file import WEIGHTS_FILE
from granatum.adapters_store.names import check_digest, is_digest
from granatum.adapters_store.objects.objects import Listed, Objects
from granatum.v1.errors import NotFound, Unavailable

EPOCH_S = 3600
PREFIX = "blobs"
_RANGE_BYTES = 8 << 20
_RANGES_AHEAD = 4

log = structlog.get_logger(__name__)


def epoch_of(time_s: float) -> int:
    """The epoch of a moment in Unix seconds."""
    return int(time_s // EPOCH_S)


def epoch_end(epoch: int) -> float:
    """When an epoch is over, in Unix seconds."""
    return float((epoch + 1) * EPOCH_S)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on the local disk."""

    config: Path
    weights: Path


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes stored under one digest in one epoch, by file name."""

    digest: str
    epoch: int
    files: dict[str, Listed]

    @property
    def is_complete(self) -> bool:
        """Whether every file is there."""
        return self.files.keys() >= set(FILES)


class Blobs:
    """Puts, fetches and lists adapters' bytes."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._strays = Strays()

    async def put(self, digest: str, files: Iterable[Path], epoch: int) -> None:
        """Store the files in this epoch. Files that are there are replaced: they may be damaged."""
        for path in files:
            await self._objects.put_file(f"{PREFIX}/{digest}/{epoch}/{path.name}", path)

    async def listing(self, digest: str | None = None) -> list[Blob]:
        """The blobs of one digest, or all; newest first within a digest."""
        if digest is not None:
            return self._gather(await self._objects.listing(f"{PREFIX}/{digest}"))
        # There may be millions of objects. In a thread they do not hold up the tokens of streams.
        return await asyncio.to_thread(self._gather, await self._objects.listing(PREFIX))

    def _gather(self, objects: Iterable[Listed]) -> list[Blob]:
        found: dict[tuple[str, int], dict[str, Listed]] = {}
        for listed in objects:
            place = _place(listed.key)
            if place is None:
                self._strays.leave(listed.key)
            else:
                owner, epoch, name = place
                found.setdefault((owner, epoch), {})[name] = listed
        return [Blob(*key, found[key]) for key in sorted(found, reverse=True)]

    async def fetch(self, digest: str, directory: Path) -> AdapterFiles:
        """Bring the adapter to `directory/<digest>/`, whole and verified, or not at all.

        Raises NotFound if the store has no such bytes. Raises Unavailable if the store is away, or
        (reason ADAPTER_CORRUPTED) if all of its copies are damaged.
        """
        target = directory / check_digest(digest)
        if not target.is_dir():
            await self._fetch_into(digest, directory, target)
        return AdapterFiles(target / CONFIG_FILE, target / WEIGHTS_FILE)

    async def read_chat(self, digest: str, sha256: str) -> bytes:
        """An adapter's `chat.json`, which must have this SHA-256. Raises as `fetch`."""
        stored = [blob.files.get(CHAT_FILE) for blob in await self.listing(check_digest(digest))]
        for listed in stored:
            if listed is not None and listed.size <= MAX_CHAT_BYTES:
                data = await self._objects.read_range(listed.key, 0, listed.size)
                if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return data
        if any(stored):
            raise _damaged(digest)
        raise _missing(digest)

    async def _fetch_into(self, digest: str, directory: Path, target: Path) -> None:
        blobs = [blob for blob in await self.listing(digest) if blob.is_complete]
        for blob in blobs:
            partial = directory / f".{digest}.{uuid4().hex}"
            partial.mkdir(parents=True)
            try:
                if await self._download(blob, partial):
                    await asyncio.to_thread(_move, partial, target)
                    return
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            log.error("stored adapter is damaged", digest=digest, epoch=blob.epoch)
        if blobs:
            raise _damaged(digest)
        raise _missing(digest)

    async def _download(self, blob: Blob, directory: Path) -> bool:
        """Whether the bytes that came are those of the digest."""
        sums = {}
        for name, listed in blob.files.items():
            sha256 = hashlib.sha256()
            with (directory / name).open("wb") as sink:
                async for data in self._read(listed):
                    await asyncio.to_thread(_append, sink, sha256, data)
            sums[name] = sha256.digest()
        chat = sums.get(CHAT_FILE, b"")
        return adapter_digest(sums[CONFIG_FILE], sums[WEIGHTS_FILE], chat) == blob.digest

    async def _read(self, listed: Listed) -> AsyncIterator[bytes]:
        """An object's bytes in order. A few ranges are read ahead, each by a request of its own."""
        begins = range(0, listed.size, _RANGE_BYTES)
        for batch in range(0, len(begins), _RANGES_AHEAD):
            reads = [
                self._objects.read_range(listed.key, begin, min(begin + _RANGE_BYTES, listed.size))
                for begin in begins[batch : batch + _RANGES_AHEAD]
            ]
            for data in await asyncio.gather(*reads):
                yield data or b""


def _damaged(digest: str) -> Unavailable:
    return Unavailable(
        f"the stored bytes of adapter sha256:{digest} are damaged: upload it again",
        reason="ADAPTER_CORRUPTED",
    )


def _missing(digest: str) -> NotFound:
    return NotFound(f"the store has no adapter sha256:{digest}: upload it again")


def _place(key: str) -> tuple[str, int, str] | None:
    """Digest, epoch and file name of a blob's object; None if the key is no blob's."""
    parts = key.split("/")
    if len(parts) != 4 or not is_digest(parts[1]) or parts[3] not in (*FILES, CHAT_FILE):
        return None
    epoch = epoch_in(parts[2])
    return None if epoch is None else (parts[1], epoch, parts[3])


def _append(sink: BinaryIO, sha256: "hashlib._Hash", data: bytes) -> None:
    sink.write(data)
    sha256.update(data)


def _move(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        # Another fetch was faster, and brought the same bytes.
        if not target.is_dir():
            raise
