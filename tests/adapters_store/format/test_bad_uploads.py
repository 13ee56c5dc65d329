"""Every bad upload is refused in its own words and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
from adapter_files import Upload, config, good_upload, pack, tensors, upload, weights
from bad_uploads import BAD_UPLOADS
from uploading import BASE, SHAPE, files_under, send

from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidRequest


@pytest.mark.parametrize("case", BAD_UPLOADS)
async def test_refused_and_gone(case: str, tmp_path: Path) -> None:
    bad = BAD_UPLOADS[case]
    store = AdapterStore.open(str(tmp_path), BASE)
    with pytest.raises(InvalidRequest) as error:
        await send(store, "acme", bad.make(SHAPE))
    assert bad.message in error.value.message
    assert files_under(tmp_path) == []
    assert (await store.list("acme")).adapters == ()


def test_there_are_many() -> None:
    assert len(BAD_UPLOADS) >= 30


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 5, 256])
async def test_the_table_s_good_upload_is_good(dtype: str, rank: int) -> None:
    store = AdapterStore.open("memory://", BASE)
    good = good_upload(SHAPE, rank=rank, dtype=dtype)
    manifest, created = await send(store, "acme", good)
    assert (manifest.max_rank, manifest.target_modules) == (rank, ("q_proj", "v_proj"))
    assert (manifest.size_bytes, created) == (len(good.data), True)


@pytest.mark.parametrize("position", [0, 1, -1])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("F32", np.float32("nan")),
        ("F32", np.float32("-inf")),
        ("F16", np.float16("nan")),
        ("BF16", np.uint16(0xFF80)),
        ("BF16", np.uint16(0x7FC1)),
    ],
)
async def test_one_bad_number_anywhere(dtype: str, value: np.generic, position: int) -> None:
    parts = tensors(SHAPE, dtype=dtype)
    name = list(parts)[3]
    numbers = np.frombuffer(parts[name].data, value.dtype).copy()
    numbers[position] = value
    parts[name] = type(parts[name])(dtype, parts[name].shape, numbers.tobytes())
    with pytest.raises(InvalidRequest, match=f"{name}: element {position % numbers.size} "):
        await send(AdapterStore.open("memory://", BASE), "acme", upload(config(), weights(parts)))


def _rank_pattern() -> Upload:
    parts = tensors(SHAPE, rank=4, targets=("q_proj",)) | tensors(SHAPE, 2, ("down_proj",))
    fields = config(4, ("q_proj", "down_proj"), rank_pattern={"mlp.down_proj": 2})
    return upload(fields, weights(parts))


async def test_ranks_follow_the_pattern() -> None:
    manifest, _ = await send(AdapterStore.open("memory://", BASE), "acme", _rank_pattern())
    assert (manifest.max_rank, manifest.target_modules) == (4, ("down_proj", "q_proj"))


async def test_random_damage_is_refused_or_harmless() -> None:
    """A flipped byte anywhere gives an adapter with that byte, or InvalidRequest, nothing else."""
    good = good_upload(SHAPE)
    size = good.files[0].size_bytes
    fields, data = good.data[:size], bytearray(good.data[size:])
    random = np.random.default_rng(0)
    store = AdapterStore.open("memory://", BASE)
    header_end = 8 + int.from_bytes(data[:8], "little")
    for at in random.integers(0, header_end, 300):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(random.integers(8))
        try:
            await send(store, "acme", upload(fields, bytes(damaged)))
        except InvalidRequest as error:
            assert error.message.startswith("adapter_")  # noqa: PT017 - either is right
    assert pack({}, b"")[:8] == (8).to_bytes(8, "little")
