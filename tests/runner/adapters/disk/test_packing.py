"""Packing in processes of its own: the same image, and its accidents stay there."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from small_adapters import BASE, digest_of, write_adapter

from granatum.runner.adapters.disk import packing as adapter_packing
from granatum.runner.adapters.disk.packing import Packers, pack_image
from granatum.runner.adapters.images.image import ImageShape
from granatum.v1.errors import InvalidAdapter, Unavailable

SHAPE = ImageShape(BASE, "bfloat16", 4096, max_rank=16)


@pytest.fixture
def packers() -> Iterator[Packers]:
    packers = Packers(SHAPE)
    yield packers
    packers.close()


def packing_processes() -> list[psutil.Process]:
    """Ours that pack."""
    children = psutil.Process().children()
    return [c for c in children if adapter_packing.__name__ in c.cmdline()]


def test_the_image_is_the_one_that_is_made_here(tmp_path: Path, packers: Packers) -> None:
    write_adapter(tmp_path / "files", 1, 16, ["q_proj", "down_proj"])
    here, there = tmp_path / "here.image", tmp_path / "there.image"
    pages = pack_image(SHAPE, tmp_path / "files", here, digest_of(1))
    assert packers.pack(tmp_path / "files", there, digest_of(1)) == pages
    assert here.read_bytes() == there.read_bytes()
    (process,) = packing_processes()
    assert process.nice() > psutil.Process().nice()
    assert not any("torch" in region.path for region in process.memory_maps())


def test_what_is_wrong_with_an_adapter_comes_through(tmp_path: Path, packers: Packers) -> None:
    write_adapter(tmp_path / "files", 1, 24, ["q_proj"])
    with pytest.raises(InvalidAdapter, match="rank 24") as refused:
        packers.pack(tmp_path / "files", tmp_path / "x.image", digest_of(1))
    assert refused.value.reason == "ADAPTER_RANK_TOO_HIGH"
    with pytest.raises(FileNotFoundError):
        packers.pack(tmp_path / "none", tmp_path / "x.image", digest_of(1))
    assert not (tmp_path / "x.image").exists()


def test_what_ends_the_process_fails_that_load_alone(
    tmp_path: Path, packers: Packers, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, target = tmp_path / "files", tmp_path / "x.image"
    write_adapter(files, 1, 16, ["q_proj"])
    packers.pack(files, target, digest_of(1))
    (process,) = packing_processes()
    config = (files / "adapter_config.json").read_bytes()
    (files / "adapter_config.json").unlink()
    os.mkfifo(files / "adapter_config.json")  # the process waits for it until it is killed
    monkeypatch.setattr(adapter_packing, "PACKING_S", 0.5)
    with pytest.raises(Unavailable) as refused:
        packers.pack(files, target, digest_of(1))
    assert refused.value.reason == "ADAPTER_PACKING_FAILED"
    monkeypatch.undo()
    assert not process.is_running()
    (files / "adapter_config.json").unlink()
    (files / "adapter_config.json").write_bytes(config)
    assert packers.pack(files, target, digest_of(1)) > 0
    (process,) = packing_processes()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert packers.pack(files, target, digest_of(1)) > 0, "one that died idle is no failure"


def test_patterns_that_take_long_end_within_seconds_and_hold_up_nobody(
    tmp_path: Path, packers: Packers
) -> None:
    for name in ("hostile", "simple"):
        write_adapter(tmp_path / name, 1, 16, ["q_proj"])
    config = json.loads((tmp_path / "hostile" / "adapter_config.json").read_text())
    letters = "".join(chr(0x4E00 + 2 * i) for i in range(900))
    config["rank_pattern"] = {f"(?:[{letters}a-z.0-9_]*){i}": 16 for i in range(3000)}
    (tmp_path / "hostile" / "adapter_config.json").write_text(json.dumps(config))
    with ThreadPoolExecutor(1) as threads:
        before = psutil.Process().cpu_times().children_user
        hostile = threads.submit(
            packers.pack, tmp_path / "hostile", tmp_path / "h.image", digest_of(1)
        )
        until_busy(packers)
        assert packers.pack(tmp_path / "simple", tmp_path / "s.image", digest_of(2)) > 0
        error = hostile.exception(60)
        assert isinstance(error, InvalidAdapter | Unavailable)
    packers.close()
    assert psutil.Process().cpu_times().children_user - before < 10


def until_busy(packers: Packers) -> None:
    deadline = time.monotonic() + 10
    while packers._idle.qsize() == adapter_packing.PROCESSES:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_process_ends_with_ours_however_that_ends() -> None:
    program = f"""
import os, pickle
from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.adapters.disk.packing import Packers
packers = Packers(ImageShape(pickle.loads({pickle.dumps(BASE)!r}), "float32", 4096))
print(packers._idle.get()._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(ended.stdout)).wait(20)
