"""Devices as the environment and the driver's own tool name them."""

from pathlib import Path

import pytest

from granatum.cli.box import hardware


@pytest.mark.parametrize(
    ("visible", "number"), [("", 0), ("0", 1), ("2, 3", 2), ("-1", 0), ("0,-1,1", 1)]
)
def test_the_environment_decides(
    visible: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.devices() == tuple(f"cuda:{index}" for index in range(number))


@pytest.mark.parametrize(
    ("tool", "number"),
    [
        (None, 0),
        ("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: H100'", 2),
        ("#!/bin/sh\necho 'no driver'; exit 9", 0),
        ("#!/nowhere", 0),
        ("#!/bin/sh\nsleep 60", 0),
    ],
)
def test_else_the_driver_lists_them_if_it_can(
    tool: str | None, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "_TIMEOUT_S", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if tool else str(tmp_path))
    if tool:
        (tmp_path / "nvidia-smi").write_text(tool)
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert len(hardware.devices()) == number
