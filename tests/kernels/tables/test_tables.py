"""Tables by difference: what is packaged, what users add, and which entry serves."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from granatum.kernels.device import Gpu
from granatum.kernels.linear import tuning as linear
from granatum.kernels.lora import tuning as lora
from granatum.kernels.tables import tables

H200 = Gpu("NVIDIA H200", sms=132, shared_memory=232448, capability=(9, 0))
H100 = Gpu("NVIDIA H100 80GB HBM3", sms=132, shared_memory=232448, capability=(9, 0))
A10 = Gpu("NVIDIA A10", sms=72, shared_memory=101376, capability=(8, 6))
PACKAGED = Path(tables.__file__).parent
FIELDS = {lora.OP: lora.FIELDS, linear.OP: linear.FIELDS}
DECODE = lora.Shape(4096, (14336, 14336), 16, lora.DECODE_BLOCK_M)


@pytest.fixture(autouse=True)
def no_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tables, "_users", {})
    tables._changed()
    yield
    tables._changed()


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*/*.json")), ids=lambda p: p.parent.name)
def test_a_packaged_table_names_fields_that_there_are(path: Path) -> None:
    assert tables.read(path, FIELDS[path.stem])


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*/lora.json")), ids=lambda p: p.parent.name)
def test_no_entry_repeats_a_default(path: Path) -> None:
    for name, by_rank in tables.read(path, lora.FIELDS).items():
        widths, _, kind = name.partition(" bf16 by ")
        inner, outs = widths.split("->")
        block_m = lora.PREFILL_BLOCK_M if kind == "tiles" else lora.DECODE_BLOCK_M
        for rank, differences in by_rank.items():
            outer = tuple(int(n) for n in outs.split("+"))
            shape = lora.Shape(int(inner), outer, rank, block_m)
            assert shape.key == name
            default = asdict(lora.default_config(shape, pdl=True))
            assert differences is None or differences
            for field, value in (differences or {}).items():
                assert default[field] != value, f"{name}, rank {rank}: {field}"


def test_every_packaged_table_serves_some_gpu() -> None:
    folders = set(json.loads((PACKAGED / "gpus.json").read_text()).values())
    assert folders == {path.parent.name for path in PACKAGED.glob("*/*.json")}


def test_an_h100_takes_what_was_measured_on_an_h200() -> None:
    measured = lora.measured(H200, DECODE)
    assert measured.silu_n == 256
    assert measured != lora.default_config(DECODE, pdl=True)
    assert lora.measured(H100, DECODE) == measured
    assert linear.measured(H100, 4096, 6144, 8) == linear.Config(64, 128, 1, 4, 6)
    assert linear.measured(H100, 4096, 4096, 64) is None  # the library was faster


def test_a_gpu_is_found_by_whole_words_and_by_the_longest_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "_gpus", lambda: {"L4": "l4", "RTX": "old", "RTX 6000": "ada"})
    monkeypatch.setattr(tables, "_packaged", lambda folder, op: {f"{op} of {folder}": {}})

    def found(name: str) -> list[str]:
        gpu = Gpu(name, sms=1, shared_memory=1, capability=(8, 9))
        folders = ("l4", "old", "ada")
        return [folder for folder in folders if tables.is_measured(gpu, "op", f"op of {folder}")]

    assert found("NVIDIA L4") == ["l4"]
    assert found("NVIDIA L40S") == []
    assert found("NVIDIA RTX 6000 Ada Generation") == ["ada"]


def test_an_op_without_a_table_takes_the_defaults_on_a_measured_gpu() -> None:
    assert tables.find(H200, "an op that was never tuned", DECODE.key, 16) is None


def test_an_unmeasured_gpu_takes_the_defaults_and_the_library() -> None:
    assert lora.measured(A10, DECODE) == lora.default_config(DECODE, pdl=False)
    assert linear.measured(A10, 4096, 6144, 8) is None
    assert not tables.is_measured(A10, lora.OP, DECODE.key)
    assert tables.is_measured(H100, lora.OP, DECODE.key)


@pytest.mark.parametrize(("size", "served"), [(8, 16), (16, 16), (17, 64), (64, 64), (256, 64)])
def test_the_nearest_size_serves_from_the_asked_one_up_if_any(size: int, served: int) -> None:
    for measured in (64, 16):
        tables.put(A10, "op", "shape", measured, {"field": measured})
    assert tables.find(A10, "op", "shape", size) == {"field": served}


def test_a_size_where_the_default_was_best_is_no_gap() -> None:
    tables.put(A10, "op", "shape", 16, None)
    tables.put(A10, "op", "shape", 64, {"field": 1})
    assert tables.find(A10, "op", "shape", 8) is None
    assert tables.is_measured(A10, "op", "shape")


def test_a_users_table_adds_to_the_packaged_one_and_wins(tmp_path: Path) -> None:
    made: tables.Shapes = {DECODE.key: {16: {"silu_n": 64}}, "1->1 bf16 by rows": {8: None}}
    tables.write(tables.user_table(tmp_path, H200, lora.OP), H200, made)
    tables.add(tmp_path, H200, FIELDS)
    assert lora.measured(H200, DECODE).silu_n == 64
    other_rank = lora.Shape(DECODE.in_features, DECODE.out_features, 32, DECODE.block_m)
    assert lora.measured(H200, other_rank).rank_blocks == 4  # the packaged entry of that rank
    assert tables.is_measured(H200, lora.OP, "1->1 bf16 by rows")
    assert lora.measured(H100, DECODE).silu_n == 256  # the user measured another GPU


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"shapes": {"a": [1]}}', '{"shapes": {"a": {"16": {"no_field": 1}}}}',
     '{"shapes": {"a": {"16": {"silu_n": "64"}}}}', '{"shapes": {"a": {"x": null}}}',
     '{"shapes": {"a": {"16": {"silu_n": 0}}}}', '{"shapes": {"a": {"16": {"silu_n": 10000000}}}}',
     '{"shapes": {"a": {"16": {"silu_n": true}}}}', '{"shapes": {"a": {"16": {"pdl": 7}}}}',
     '{"shapes": {"a": {"0": null}}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_table_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tables.user_table(tmp_path, A10, lora.OP)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"lora\.json is no table of configurations"):
        tables.add(tmp_path, A10, FIELDS)


def test_a_linear_has_no_defaults_so_an_entry_names_all_fields(tmp_path: Path) -> None:
    path = tables.user_table(tmp_path, A10, linear.OP)
    path.parent.mkdir()
    path.write_text('{"shapes": {"1->1 bf16": {"16": {"block_n": 64}}}}')
    with pytest.raises(ValueError, match=r"linear\.json is no table .*: block_k is missing"):
        tables.add(tmp_path, A10, FIELDS)
