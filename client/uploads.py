"""A PEFT adapter's folder as an upload: first a declaration of its files, then their bytes."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from granatum.client.chat_files import CHAT_FILE, chat_settings
from granatum.client.fields import filled
from granatum.client.folder import CONFIG, WEIGHTS, check_folder
from granatum.v1 import adapters_pb2
from granatum.v1.errors import InvalidRequest

FILES = (CONFIG, WEIGHTS)
CHUNK_BYTES = 256 << 10


async def declare(
    name: str, directory: Path, for_base: str
) -> tuple[adapters_pb2.UploadHeader, bytes]:
    """The declaration of an upload's files, and the bytes of CHAT_FILE; empty if there is none.

    The files in `directory` are hashed off the event loop. Raises InvalidRequest if `directory` is
    no PEFT adapter's; the message says what it is.
    """
    await asyncio.to_thread(check_folder, directory)
    files = [await asyncio.to_thread(_declaration, directory / file) for file in FILES]
    chat = await asyncio.to_thread(chat_settings, directory)
    if chat is not None:
        digest = hashlib.sha256(chat).hexdigest()
        files.append(
            adapters_pb2.FileDeclaration(name=CHAT_FILE, size_bytes=len(chat), sha256=digest)
        )
    header = filled(adapters_pb2.UploadHeader(files=files), name=name, base_model=for_base)
    return header, chat or b""


async def send(
    header: adapters_pb2.UploadHeader, directory: Path, chat: bytes
) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    """The messages of an upload that was declared so. Files are read off the event loop."""
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for file in header.files:
        if file.name == CHAT_FILE:
            yield adapters_pb2.UploadAdapterRequest(chunk=chat)
            continue
        async for chunk in _chunks(directory / file.name):
            yield adapters_pb2.UploadAdapterRequest(chunk=chunk)


def _declaration(path: Path) -> adapters_pb2.FileDeclaration:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return adapters_pb2.FileDeclaration(
                name=path.name, size_bytes=file.tell(), sha256=digest
            )
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {path} ({error.strerror}): "
            "give the folder that PEFT's save_pretrained wrote"
        ) from None


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(path.open, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
