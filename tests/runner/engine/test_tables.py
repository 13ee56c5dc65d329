"""What an engine does with measured tables as it starts, on GPUs that are not there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from granatum.kernels.device import Gpu
from granatum.kernels.lora import tuning as lora
from granatum.kernels.tables import tables
from granatum.models.config import ModelConfig
from granatum.runner.engine import process
from granatum.runner.engine.process import EngineOptions
from granatum.runner.tune.search import keep
from granatum.runner.tune.tasks import tasks
from granatum.v1.errors import InvalidRequest

A10 = Gpu("NVIDIA A10", sms=72, shared_memory=101376, capability=(8, 6))
H200 = Gpu("NVIDIA H200", sms=132, shared_memory=232448, capability=(9, 0))
LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
SMALL = ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 2048)


@pytest.fixture(autouse=True)
def no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_users", {})


def start(gpu: Gpu, config: ModelConfig, folder: Path | None = None) -> list[dict[str, Any]]:
    """What the log of an engine says of its tables."""
    options = EngineOptions(Path("model"), max_rank=16, tables=folder)
    with capture_logs() as logs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "gpu_of", lambda _device: gpu)
        process._read_tables(options, config, torch.device("cuda"))
    return [dict(line) for line in logs]


def test_what_was_measured_needs_no_word() -> None:
    assert start(H200, LLAMA_8B) == []


def test_what_was_not_measured_is_said_once_with_the_command(tmp_path: Path) -> None:
    (line,) = start(A10, SMALL, tmp_path)
    assert line["log_level"] == "warning"
    assert line["gpu"] == "NVIDIA A10"
    assert "lora 576->1536+1536 bf16 by rows" in line["shapes"]
    assert "linear 576->49152 bf16" in line["shapes"]
    assert line["command"] == f"granatum tune --model model --max-rank 16 --out {tmp_path}"
    (other,) = start(H200, SMALL)
    assert other["command"] == "granatum tune --model model --max-rank 16"


def test_a_users_table_serves(tmp_path: Path) -> None:
    for task in tasks(SMALL, 16, A10):
        keep(task, {"rank_blocks": 1} if task.op == lora.OP else None, tmp_path, A10)
    tables._users.clear()
    assert start(A10, SMALL, tmp_path) == []
    shape = lora.Shape(576, (576, 192, 192), 16, lora.DECODE_BLOCK_M)
    assert lora.measured(A10, shape).rank_blocks == 1


def test_a_damaged_table_is_refused_by_name(tmp_path: Path) -> None:
    path = tables.user_table(tmp_path, A10, lora.OP)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(InvalidRequest, match=r"lora\.json is no table.*--tables"):
        start(A10, SMALL, tmp_path)


def test_a_cpu_has_no_tables(tmp_path: Path) -> None:
    options = EngineOptions(Path("model"), "cpu", tables=tmp_path)
    with capture_logs() as logs:
        process._read_tables(options, SMALL, torch.device("cpu"))
    assert logs == []
