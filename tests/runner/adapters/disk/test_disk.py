"""The directory of images: shared by processes, bounded, and not ours alone."""

import errno
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_adapters import BASE, digest_of, write_adapter

from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.disk.lock import locked
from granatum.runner.adapters.images.file import DamagedImage
from granatum.runner.adapters.images.image import ImageShape
from granatum.v1.errors import GranatumError, InvalidRequest, Unavailable

SHAPE = ImageShape(BASE, "float32", 4096)
FOLDER = SHAPE.key.hex()[:16]


class Store:
    """Directories of adapters, as the object store would bring them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def add(self, *numbers: int) -> None:
        for number in numbers:
            write_adapter(self.root / digest_of(number), number, 16, ["q_proj"])

    def fetch(self, digest: str, directory: Path) -> Path:
        self.fetched.append(digest)
        assert self.go_on.wait(20)
        shutil.copytree(self.root / digest, directory / digest)
        return directory / digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.add(1)
    return store


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_disk(cache: Path, store: Store, limit: int = 1 << 30) -> DiskImages:
    return DiskImages(cache, limit, SHAPE, store.fetch)


def image_of(cache: Path, number: int) -> Path:
    return cache / FOLDER / f"{digest_of(number)}.image"


def read(disk: DiskImages, number: int) -> None:
    digest = digest_of(number)
    pages = [memoryview(bytearray(SHAPE.page_bytes)) for _ in range(disk.measure(digest))]
    disk.read(digest, pages)


def test_runners_that_share_a_directory_fetch_and_pack_once(cache: Path, store: Store) -> None:
    disks = [open_disk(cache, store) for _ in range(6)]
    store.go_on.clear()
    with ThreadPoolExecutor(len(disks)) as threads:
        found = [threads.submit(disk.measure, digest_of(1)) for disk in disks]
        threading.Timer(0.2, store.go_on.set).start()
        assert len({future.result() for future in found}) == 1
    assert store.fetched == [digest_of(1)]
    assert not list(cache.rglob("*.lock"))


def _hold(path: Path, held: object) -> None:
    with locked(path, 1):
        held.set()  # type: ignore[attr-defined]
        threading.Event().wait()


def test_a_runner_that_was_killed_while_it_made_an_image_lets_go(cache: Path, store: Store) -> None:
    disk = open_disk(cache, store)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    lock = image_of(cache, 1).with_suffix(".lock")
    other = context.Process(target=_hold, args=(lock, held), daemon=True)
    other.start()
    assert held.wait(30)
    with pytest.raises(TimeoutError), locked(lock, 0.1):
        pass
    other.kill()
    other.join()
    assert disk.measure(digest_of(1)) > 0


def test_the_limit_counts_what_another_runner_made(cache: Path, store: Store) -> None:
    store.add(2, 3, 4)
    pages = open_disk(cache, store).measure(digest_of(1))
    one, other = (open_disk(cache, store, 2 * pages * SHAPE.page_bytes) for _ in range(2))
    read(one, 2)
    read(other, 3)
    read(one, 4)
    assert {path.stem for path in cache.rglob("*.image")} == {digest_of(3), digest_of(4)}
    read(other, 2)  # it has gone, and is made again
    assert {path.stem for path in cache.rglob("*.image")} == {digest_of(4), digest_of(2)}


def test_the_limit_counts_images_of_other_models(cache: Path, store: Store) -> None:
    other = ImageShape(BASE, "bfloat16", 4096)
    DiskImages(cache, 1 << 30, other, store.fetch).measure(digest_of(1))
    store.add(2)
    open_disk(cache, store, limit=1).measure(digest_of(2))
    assert [path.stem for path in cache.rglob("*.image")] == [digest_of(2)]


def as_directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("theirs")


def as_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def as_looping_link(path: Path) -> None:
    path.symlink_to(path)


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_file(path: Path) -> None:
    path.write_text("theirs")


def as_unreadable(path: Path) -> None:
    path.write_text("theirs")
    path.chmod(0)


STRANGE = [as_directory, as_broken_link, as_looping_link, as_pipe, as_file, as_unreadable]


@pytest.mark.parametrize("name", ["x.image", ".image", f"{'A' * 64}.image", "notes.txt"])
@pytest.mark.parametrize("put", STRANGE)
def test_what_is_none_of_ours_is_left_alone(
    cache: Path, store: Store, name: str, put: Callable[[Path], None]
) -> None:
    (cache / FOLDER).mkdir(parents=True)
    stranger = cache / FOLDER / name
    put(stranger)
    disk = open_disk(cache, store, limit=1)
    assert disk.measure(digest_of(1)) > 0
    assert os.path.lexists(stranger)


@pytest.mark.parametrize("put", STRANGE)
def test_whatever_has_an_images_name_ends_no_start(
    cache: Path, store: Store, put: Callable[[Path], None]
) -> None:
    (cache / FOLDER).mkdir(parents=True)
    put(image_of(cache, 1))
    store.add(2)
    disk = open_disk(cache, store)
    assert disk.size(digest_of(1)) is None
    assert disk.measure(digest_of(2)) > 0
    if put is as_directory:
        with pytest.raises(Unavailable):
            disk.measure(digest_of(1))
        assert (image_of(cache, 1) / "precious").exists()
    else:
        read(disk, 1)


@pytest.mark.parametrize("blocked", [".", FOLDER])
def test_a_directory_that_cannot_be_made_ends_loads_and_not_the_start(
    cache: Path, store: Store, blocked: str
) -> None:
    path = cache / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    disk = open_disk(cache, store)
    with pytest.raises(Unavailable) as refused:
        disk.measure(digest_of(1))
    assert refused.value.reason == "ADAPTER_DISK"
    assert str(cache) not in refused.value.message
    path.unlink()
    assert disk.measure(digest_of(1)) > 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(cache: Path, store: Store, number: int) -> None:
    def fetch(digest: str, directory: Path) -> Path:
        raise OSError(number, "no room in /secret/path")

    disk = DiskImages(cache, 1 << 30, SHAPE, fetch)
    with pytest.raises(Unavailable, match="is full") as refused:
        disk.measure(digest_of(1))
    assert refused.value.reason == "ADAPTER_DISK_FULL"
    assert "secret" not in refused.value.message
    assert not list(cache.rglob(".files-*"))


def test_damage_is_told_at_the_read_and_made_good_by_the_next_measure(
    cache: Path, store: Store
) -> None:
    disk = open_disk(cache, store)
    read(disk, 1)
    path = image_of(cache, 1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    pages = [memoryview(bytearray(SHAPE.page_bytes)) for _ in range(disk.measure(digest_of(1)))]
    with pytest.raises(DamagedImage):
        disk.read(digest_of(1), pages)
    read(disk, 1)
    assert store.fetched == [digest_of(1)] * 2


def test_an_image_of_a_larger_runner_is_refused_and_stays(cache: Path, store: Store) -> None:
    open_disk(cache, store).measure(digest_of(1))
    smaller = DiskImages(cache, 1 << 30, ImageShape(BASE, "float32", 4096, 8), store.fetch)
    with pytest.raises(GranatumError) as refused:
        smaller.measure(digest_of(1))
    assert refused.value.reason == "ADAPTER_RANK_TOO_HIGH"
    assert image_of(cache, 1).exists()
    assert open_disk(cache, store).size(digest_of(1)) is not None


@pytest.mark.parametrize("digest", ["../../etc", "", "a" * 63, "x"])
def test_a_name_that_is_no_digest_touches_no_file(cache: Path, store: Store, digest: str) -> None:
    with pytest.raises(InvalidRequest):
        open_disk(cache, store).measure(digest)
    assert store.fetched == []


def test_what_killed_processes_left_half_made_goes_at_the_next_start(
    cache: Path, store: Store
) -> None:
    open_disk(cache, store)
    left, held = (cache / FOLDER / f".files-{digest_of(number)}-x" for number in (1, 2))
    theirs = cache / FOLDER / ".files-of-others"
    for path in (left, held, theirs):
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"half")
    with locked(image_of(cache, 2).with_suffix(".lock"), 0):
        open_disk(cache, store)
    assert not left.exists()
    assert held.exists()
    assert theirs.exists()


def test_what_a_killed_packer_left_goes_with_its_load(cache: Path, store: Store) -> None:
    def pack(files: Path, target: Path, digest: str) -> int:
        (target.parent / ".new-half").write_bytes(bytes(1000))
        raise Unavailable(f"the packer of {digest} was killed")

    disk = DiskImages(cache, 1 << 30, SHAPE, store.fetch, pack)
    with pytest.raises(Unavailable):
        disk.measure(digest_of(1))
    assert list((cache / FOLDER).iterdir()) == []
