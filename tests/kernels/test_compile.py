"""Every kernel compiles for Hopper, as its launcher launches it, on a machine without a GPU."""

import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import compiling

from granatum.kernels import backend, device
from granatum.kernels.adapters import AdapterTable, GroupAdapters, GroupLayout, LoraRows
from granatum.kernels.attention import decode as attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.layer import activation
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.norm import add_rms_norm, embed_rms_norm
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces, Tiles
from granatum.kernels.linear import linear
from granatum.kernels.linear.dense import Dense
from granatum.kernels.linear.tuning import measured
from granatum.kernels.lora import expand_fragments
from granatum.kernels.lora import ops as lora
from granatum.kernels.lora.shrink import launch_shrink
from granatum.kernels.lora.tuning import Shape, default_config
from granatum.kernels.sampling.greedy import greedy, greedy_workspace_elements
from granatum.kernels.sampling.penalties import count_tokens, penalize
from granatum.kernels.sampling.sample import sample

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backend.INTERPRETING, reason="compiles nothing")

BF16, ROWS = torch.bfloat16, 8
H200 = device.Gpu("NVIDIA H200", sms=132, shared_memory=232448, capability=(9, 0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The kernels that launches of the test compile for an H200 and do not run."""
    made: list[Any] = []
    monkeypatch.setattr(backend, "INTERPRETING", True)  # launchers then take CPU tensors
    with compiling(90, lambda kernel, _grid: made.append(kernel)):
        yield made


def call(
    group: int, k: int, outs: tuple[int, ...], block_m: int, dtype: torch.dtype = BF16
) -> tuple[GroupAdapters, LoraRows]:
    """The records of a call on ROWS rows, of adapters of up to 64 ranks."""
    table = AdapterTable.allocate(GroupLayout((3, 1, 2, 1)), 2, 2, "cpu", 64)
    adapters = GroupAdapters(torch.empty(1024, dtype=dtype), table, 1, group, k, outs)
    workspace = torch.empty(lora.workspace_elements(ROWS, k, outs, block_m, 64, "cpu"))
    return adapters, LoraRows(Tiles.allocate(ROWS, block_m, "cpu"), workspace)


def stack_bytes(kernel: Any) -> int:
    """Bytes of stack that a kernel's threads spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", usage))


@pytest.mark.parametrize(
    ("block_m", "dtype", "kernels"),
    [
        (lora.DECODE_BLOCK_M, BF16, ["shrink_kernel", "expand_rows_kernel"]),
        (lora.DECODE_BLOCK_M, torch.float16, ["_shrink_rows_kernel", "expand_rows_kernel"]),
        (lora.PREFILL_BLOCK_M, BF16, ["_shrink_tiles_kernel", "expand_kernel"]),
        (lora.PREFILL_BLOCK_M, torch.float16, ["_shrink_tiles_kernel", "expand_tiles_kernel"]),
    ],
)
@pytest.mark.parametrize(("group", "k", "outs"), [(0, 4096, (4096,) * 3), (3, 11008, (4096,))])
def test_lora(
    group: int,
    k: int,
    outs: tuple[int, ...],
    block_m: int,
    dtype: torch.dtype,
    kernels: list[str],
    compiled: list[Any],
) -> None:
    y, x = torch.empty(ROWS, sum(outs), dtype=dtype), torch.empty(ROWS, k, dtype=dtype)
    lora.add_lora(y, x, *call(group, k, outs, block_m, dtype))
    assert [kernel.name for kernel in compiled] == kernels
    for kernel in compiled:
        assert stack_bytes(kernel) == 0
        assert re.search(r"ld\.global\.v4|cp\.async\.cg", kernel.asm["ptx"])


@pytest.mark.parametrize("bias", [None, torch.empty(4096, dtype=BF16)])
def test_a_linear_with_lora(
    bias: torch.Tensor | None, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MANY_ROWS", 1)
    x, weight = torch.empty(ROWS, 4096, dtype=BF16), torch.empty(4096, 4096, dtype=BF16)
    lora.linear_with_lora(Dense(weight, bias), x, *call(1, 4096, (4096,), 64))
    assert [kernel.name for kernel in compiled] == ["_shrink_tiles_kernel", "expand_kernel"]
    for kernel in compiled:
        assert stack_bytes(kernel) == 0


@pytest.mark.parametrize(
    ("block_m", "kernels"),
    [
        (lora.DECODE_BLOCK_M, ["shrink_kernel", "_expand_silu_rows_kernel"]),
        (lora.PREFILL_BLOCK_M, ["_shrink_tiles_kernel", "_expand_silu_tiles_kernel"]),
    ],
)
def test_an_activation_with_lora(block_m: int, kernels: list[str], compiled: list[Any]) -> None:
    x, out = torch.empty(ROWS, 4096, dtype=BF16), torch.empty(ROWS, 11008, dtype=BF16)
    gate_up = torch.empty(ROWS, 22016, dtype=BF16)
    lora.silu_mul_with_lora(gate_up, x, out, *call(2, 4096, (11008,) * 2, block_m))
    assert [kernel.name for kernel in compiled] == kernels
    for kernel in compiled:
        assert stack_bytes(kernel) <= 32  # for more than 16 ranks
        assert re.search(r"ld\.global\.v[24]|cp\.async\.cg", kernel.asm["ptx"])


@pytest.mark.parametrize("norm", [None, torch.empty(128, dtype=BF16)])
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_positions_with_lora(norm: torch.Tensor | None, kv_heads: int, compiled: list[Any]) -> None:
    kv = KvLayout(2 * 2 * kv_heads * 16 * 128, 16, kv_heads, 128)
    outs = (4096, kv_heads * 128, kv_heads * 128)
    x, qkv = torch.empty(ROWS, 4096, dtype=BF16), torch.empty(ROWS, sum(outs), dtype=BF16)
    numbers, angles = torch.zeros(ROWS, dtype=torch.int32), torch.empty(64, 64)
    adapters, rows = call(0, 4096, outs, 64)
    layer_kv, places = LayerKv(adapters.arena, kv, 1), RowPlaces(numbers, numbers)
    rotary = Rotary(angles, angles, norm, norm)
    lora.rope_with_lora(qkv, x, rotary, layer_kv, places, adapters, rows)
    assert [kernel.name for kernel in compiled] == ["_shrink_tiles_kernel", "_expand_rope_kernel"]
    for kernel in compiled:
        assert stack_bytes(kernel) == 0


@pytest.mark.parametrize(
    ("max_rank", "projections", "kilobytes"), [(16, 2, 40), (64, 1, 56), (64, 2, 72), (256, 2, 168)]
)
def test_fragments_serve_where_there_is_room(
    max_rank: int, projections: int, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs with less shared memory than an H200's other kernels do."""
    y = torch.empty(ROWS, 256, dtype=BF16)
    shape = Shape(4096, (128, 128), max_rank, lora.PREFILL_BLOCK_M)
    for room, expected in ((kilobytes << 10, True), ((kilobytes << 10) - 1, False)):
        monkeypatch.setattr(device, "NO_GPU", replace(device.NO_GPU, shared_memory=room))
        assert expand_fragments.serves(y, shape, 128, projections) is expected
    assert not expand_fragments.serves(y, shape, 256, projections)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("block_m", [lora.DECODE_BLOCK_M, lora.PREFILL_BLOCK_M])
def test_a_shrink_waits_before_it_reads_x_or_reads_it_past_l1(
    block_m: int, beside: bool, compiled: list[Any]
) -> None:
    shape, x = Shape(4096, (4096,), 64, block_m), torch.empty(ROWS, 4096, dtype=BF16)
    config = default_config(shape, pdl=True)
    launch_shrink(x, *call(1, 4096, (4096,), block_m), shape, config, beside_linear=beside)
    ptx = compiled[0].asm["ptx"]
    starts_early = beside and not shape.dot
    # One is the grid's first block's.
    assert ptx.count("griddepcontrol.wait") == (1 if starts_early else 2)
    assert re.search(r"ld\.global\.cg", ptx) or not starts_early


@pytest.mark.parametrize(
    ("kv_heads", "name"), [(32, "general_kernel"), (8, "decode_kernel"), (2, "general_kernel")]
)
def test_attention(kv_heads: int, name: str, compiled: list[Any]) -> None:
    heads = 32
    kv = KvLayout(32 * 2 * kv_heads * 16 * 128, 16, kv_heads, 128)
    q, arena = torch.empty(ROWS, heads * 128, dtype=BF16), torch.empty(1024, dtype=BF16)
    pages = torch.zeros(ROWS, 256, dtype=torch.int32)
    lengths = torch.zeros(ROWS, dtype=torch.int32)
    workspace = attention.allocate_decode_workspace(ROWS, heads, kv, 256 * 16, torch.device("cpu"))
    k, rotary = q[:, : kv_heads * 128], Rotary(torch.empty(64, 64), torch.empty(64, 64))
    attention.decode_attention(
        q, k, k, rotary, LayerKv(arena, kv, 1), pages, lengths, 0.1, torch.empty_like(q), workspace
    )
    prefill_attention(q, LayerKv(arena, kv, 1), pages, Tiles.allocate(9, 64, "cpu"), 0.1, q)
    assert [kernel.name for kernel in compiled] == [name, "_prefill_kernel"]
    spilled = 128 if kv_heads == 2 else 0  # by Triton 3.7, of the kernel for any heads
    for kernel in compiled:
        assert stack_bytes(kernel) <= spilled


@pytest.mark.parametrize("rows", [8, 32, 64])
def test_linear(rows: int, compiled: list[Any]) -> None:
    workspace = linear.Workspace.of_size(1 << 22, 1 << 10, torch.device("cpu"))
    config = measured(H200, 11008, 4096, rows)
    assert config is not None
    x, weight = torch.empty(rows, 11008, dtype=BF16), torch.empty(4096, 11008, dtype=BF16)
    linear.launch_linear(x, weight, None, workspace, config)
    assert stack_bytes(compiled[0]) == 0
    assert "wgmma" in compiled[0].asm["ptx"]


def test_an_output_projection(compiled: list[Any]) -> None:
    """Its results are the float32 sums."""
    workspace = linear.Workspace.of_size(0, 0, torch.device("cpu"))
    config = measured(H200, 4096, 128256, ROWS)
    assert config is not None
    x, weight = torch.empty(ROWS, 4096, dtype=BF16), torch.empty(128256, 4096, dtype=BF16)
    linear.launch_linear(x, weight, None, workspace, config, torch.empty(ROWS, 128256))
    assert stack_bytes(compiled[0]) == 0
    assert "cvt.rn.bf16" not in compiled[0].asm["ptx"]
    assert "wgmma" in compiled[0].asm["ptx"]


def test_the_rest(compiled: list[Any]) -> None:
    x, row = torch.empty(ROWS, 4096, dtype=BF16), torch.zeros(ROWS)
    slots = torch.zeros(ROWS, dtype=torch.int32)
    add_rms_norm(x, x.clone(), x[0], 1e-5)
    embed_rms_norm(slots, slots, x, x[0], 1e-5, x, x)
    silu_mul(x, x[:, :2048])
    kv = KvLayout(2 * 8 * 16 * 128, 16, 8, 128)
    table = torch.empty(64, 64)
    layer_kv, places = LayerKv(x, kv, 1), RowPlaces(slots, slots)
    rope_and_write_kv(x, x[:, :1024], x[:, :1024], Rotary(table, table), layer_kv, places)
    logits = torch.empty(ROWS, 32000)
    sample(logits, row, slots, row, row, row, slots, slots)
    elements = greedy_workspace_elements(ROWS, 32000)
    workspace = torch.empty(elements, dtype=torch.int64)
    greedy(logits, slots, workspace, slots, slots, slots)
    counts = torch.zeros(2, 32000, dtype=torch.int32)
    penalize(logits, counts, slots, row, row, row)
    count_tokens(counts, slots, slots)
    assert len(compiled) == 9
    for kernel in compiled:
        assert stack_bytes(kernel) == 0


@pytest.mark.usefixtures("compiled")
def test_kernels_are_compiled_ahead_and_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    kernel = activation._silu_mul_kernel

    def launch(width: int, *, warmup: bool) -> Any:
        gate_up, out = torch.empty(ROWS, 2 * width), torch.empty(ROWS, width)
        options = {"N": width, "BLOCK_N": 1024, "PDL": False}
        return kernel.run(gate_up, out, 2 * width, width, grid=(ROWS,), warmup=warmup, **options)

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_one(*args, **options)

    launch(64, warmup=True)
    compile_one = kernel.compile
    monkeypatch.setattr(kernel, "compile", noted)
    with backend.compiling_ahead():
        for width in (96, 160, 96):
            launch(width, warmup=False)  # to run it would fail, for there is no GPU
    for width in (96, 160):
        assert launch(width, warmup=True).asm["cubin"]
    assert len(threads) == 2
    assert threading.current_thread().name not in threads
