"""An upload on its way in: declared first, then checked byte by byte as it arrives."""

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from granatum.adapters_store.chat import CHAT_FILE, MAX_CHAT_BYTES
from granatum.adapters_store.format.modules import CONFIG_FILE
from granatum.adapters_store.format.safetensors_file import WEIGHTS_FILE
from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.names import check_name, is_digest, shown
from granatum.adapters_store.threads import until_done
from granatum.v1.errors import InvalidAdapter, Unavailable

FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""The files of an adapter, in the order of their bytes. CHAT_FILE may follow."""
_PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")


@dataclass(frozen=True, slots=True)
class FileDeclaration:
    """One file of an upload; `sha256` is 64 hexadecimal digits."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """What an upload is going to send: the adapter's name, and the files in order."""

    name: str
    files: tuple[FileDeclaration, ...]
    base_model: str = ""
    """The adapter's own name for its base model, from a tenant who knows that it is right."""

    def check(self, limits: UploadLimits) -> None:
        """Raise InvalidRequest or InvalidAdapter unless an adapter within `limits` is declared."""
        check_name(self.name, field="header.name")
        for file in self.files[: len(FILES) + 2]:
            _check_file_name(file.name)
        names = tuple(file.name for file in self.files)
        if names not in (FILES, (*FILES, CHAT_FILE)):
            many = len(names) > 2 * len(FILES)
            listed = f"{len(names):,} files" if many else ", ".join(names) or "no files"
            raise _undeclared(
                f"the upload declares {listed}: declare {' and '.join(FILES)}, each once, in this "
                f"order, and after them {CHAT_FILE} if there is one"
            )
        maxima = (limits.max_config_bytes, limits.max_bytes, MAX_CHAT_BYTES)
        for file, maximum in zip(self.files, maxima, strict=False):
            _check_declaration(file, maximum)

    @property
    def digest(self) -> str:
        """The adapter's digest: SHA-256 over the files' own, 64 hexadecimal digits."""
        return adapter_digest(*(bytes.fromhex(file.sha256) for file in self.files))

    @property
    def chat_sha256(self) -> str:
        """SHA-256 of the chat settings; empty if there are none."""
        return self.files[-1].sha256 if len(self.files) > len(FILES) else ""

    @property
    def size_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def adapter_digest(config_sha256: bytes, weights_sha256: bytes, chat_sha256: bytes = b"") -> str:
    """An adapter's identity, 64 hexadecimal digits, from its files' digests (32 bytes each)."""
    return hashlib.sha256(config_sha256 + weights_sha256 + chat_sha256).hexdigest()


async def receive(
    header: UploadHeader, chunks: AsyncIterator[bytes], directory: Path
) -> tuple[Path, ...]:
    """Write the declared files into `directory`; return their paths, in the declared order.

    Raises InvalidAdapter as soon as sizes or digests are not as declared.
    """
    with _Receiver(header.files, directory) as receiver:
        async for chunk in chunks:
            # A cancelled upload must not leave a thread behind that still writes files.
            await until_done(receiver.write, chunk)
        receiver.finish()
    return tuple(directory / file.name for file in header.files)


class _Receiver:
    """Cuts the stream into files."""

    def __init__(self, files: tuple[FileDeclaration, ...], directory: Path) -> None:
        self._files = files
        self._directory = directory
        self._open = ExitStack()

    def __enter__(self) -> "_Receiver":
        self._waiting = list(self._files)
        self._begin_file()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes; blocks."""
        while chunk:
            if not self._missing:
                last = self._files[-1].name
                raise InvalidAdapter(
                    f"{last}: more bytes arrived than the upload declared", field="chunk"
                )
            part, chunk = chunk[: self._missing], chunk[self._missing :]
            self._append(part)
            if not self._missing:
                self._end_file()

    def finish(self) -> None:
        """Raise unless everything declared has arrived."""
        if self._missing:
            raise InvalidAdapter(
                f"{self._file.name}: the upload ended {self._missing} bytes short of the "
                f"{self._file.size_bytes} declared",
                field="chunk",
            )

    def _begin_file(self) -> None:
        self._file = self._waiting.pop(0)
        self._missing = self._file.size_bytes
        self._sha256 = hashlib.sha256()
        self._sink = self._open.enter_context((self._directory / self._file.name).open("xb"))

    def _append(self, part: bytes) -> None:
        self._sha256.update(part)
        self._missing -= len(part)
        try:
            self._sink.write(part)
        except OSError as error:
            raise Unavailable(
                "the server has no room for this upload now: try again later",
                reason="NO_ROOM",
                retry_after_s=30.0,
            ) from error

    def _end_file(self) -> None:
        self._sink.close()
        if self._sha256.hexdigest() != self._file.sha256:
            raise InvalidAdapter(
                f"{self._file.name}: the bytes that arrived have SHA-256 "
                f"{self._sha256.hexdigest()}, not the declared {self._file.sha256}: it was damaged "
                "on the way, or changed while it was read",
                field="chunk",
            )
        if self._waiting:
            self._begin_file()


def _undeclared(text: str) -> InvalidAdapter:
    return InvalidAdapter(text, field="header.files")


def _check_file_name(name: str) -> None:
    if name in (*FILES, CHAT_FILE):
        return
    if "/" in name or "\\" in name or ".." in name:
        raise _undeclared(f"file {shown(name)}: a file's name must not be a path")
    if _PICKLE.fullmatch(name):
        raise _undeclared(
            f"file {shown(name)} is a pickle, which could run code: "
            "make a safetensors file of it with granatum adapters convert"
        )
    raise _undeclared(f"file {shown(name)} is no part of an adapter: upload {' and '.join(FILES)}")


def _check_declaration(file: FileDeclaration, maximum: int) -> None:
    if not is_digest(file.sha256):
        raise _undeclared(
            f"{file.name}: declare its SHA-256 as 64 hexadecimal digits in lower case"
        )
    if file.size_bytes < 1:
        raise _undeclared(f"{file.name}: it is declared empty")
    if file.size_bytes > maximum:
        raise _undeclared(
            f"{file.name}: {file.size_bytes} bytes are declared, more than the {maximum} allowed"
        )
