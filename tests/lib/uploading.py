"""A tiny base model, and uploads for it given straight to a store."""

from collections.abc import AsyncIterator
from pathlib import Path

from adapter_files import Shape, Upload, good_upload

from granatum.adapters_store.blobs.incoming import FileDeclaration, UploadHeader
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.store import AdapterStore
from granatum.models.base_model import BaseModel

_HIDDEN, _INNER, _QUERY, _KEY = 16, 24, 32, 8
BASE = BaseModel(
    name="tiny",
    num_layers=2,
    features={
        "q_proj": (_HIDDEN, _QUERY),
        "k_proj": (_HIDDEN, _KEY),
        "v_proj": (_HIDDEN, _KEY),
        "o_proj": (_QUERY, _HIDDEN),
        "gate_proj": (_HIDDEN, _INNER),
        "up_proj": (_HIDDEN, _INNER),
        "down_proj": (_INNER, _HIDDEN),
    },
    fingerprint="0" * 64,
)
SHAPE = Shape(BASE.num_layers, BASE.features)


class Clock:
    """A time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_hours(self, hours: float) -> None:
        self.now += hours * 3600


def header_of(upload: Upload) -> UploadHeader:
    """The upload's header as the store takes it."""
    files = tuple(FileDeclaration(f.name, f.size_bytes, f.sha256) for f in upload.files)
    return UploadHeader(upload.name, files)


async def chunks_of(upload: Upload, size: int = 1000) -> AsyncIterator[bytes]:
    """The upload's bytes, in chunks that end within files."""
    for begin in range(0, len(upload.data), size):
        yield upload.data[begin : begin + size]


async def send(store: AdapterStore, tenant: str, upload: Upload) -> tuple[Manifest, bool]:
    """Give an upload to the store."""
    return await store.upload(tenant, header_of(upload), chunks_of(upload))


async def put(store: AdapterStore, tenant: str, name: str, seed: int = 0) -> Manifest:
    """Store an adapter; another `seed` gives other bytes."""
    return (await send(store, tenant, good_upload(SHAPE, name, seed=seed)))[0]


def files_under(path: Path) -> list[Path]:
    """Every file there, at any depth."""
    return sorted(file for file in path.rglob("*") if file.is_file())
