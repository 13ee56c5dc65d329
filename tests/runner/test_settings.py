"""A runner's flags and environment."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import LlamaConfig

from granatum.adapters_store.format.modules import ModuleSpec
from granatum.examples.tasks import BASE_MODEL
from granatum.models.base_model import BaseModel
from granatum.models.config import read_config
from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.adapters.images.layout import lay_out
from granatum.runner.engine.child import _options, keep_kernels
from granatum.runner.model.arena import page_tokens
from granatum.runner.settings import RunnerSettings
from granatum.v1.errors import InvalidRequest

FLAGS = ["--model", str(BASE_MODEL), "--store", "memory://", "--cache-dir", "cache"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANATUM_CLUSTER_KEY", "secret")


def read(*flags: str) -> RunnerSettings:
    return RunnerSettings(_cli_parse_args=[*FLAGS, *flags])  # type: ignore[call-arg]


def test_flags_and_the_key_of_the_environment() -> None:
    settings = read("--router", "a:1", "--router", "b:2", "--max-batch", "3", "--insecure")
    assert settings.router == ("a:1", "b:2")
    assert settings.cluster_key.get_secret_value() == "secret"
    assert (settings.max_batch, settings.insecure, settings.device) == (3, True, "auto")


def test_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODEL", str(BASE_MODEL)), ("STORE", "memory://"), ("CACHE_DIR", "c")):
        monkeypatch.setenv(f"GRANATUM_RUNNER_{name}", value)
    monkeypatch.setenv("GRANATUM_RUNNER_ROUTER", "a:1, b:2")
    settings = RunnerSettings(_cli_parse_args=[])  # type: ignore[call-arg]
    assert settings.router == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "tpu"), "device"),
        (("--max-rank", "257"), "max_rank"),
        (("--model", "/nowhere"), "/nowhere does not exist"),
        (("--memory-fraction", "1.5"), "memory_fraction"),
    ],
)
def test_wrong_values_are_named(flags: tuple[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read("--router", "a:1", *flags)


def test_some_router_is_needed() -> None:
    with pytest.raises(ValidationError, match="at least one router"):
        read("--router", ",")


def test_empty_cluster_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANATUM_CLUSTER_KEY", " ")
    with pytest.raises(ValidationError, match="cluster key is empty"):
        read("--router", "a:1")


def test_secret_is_not_shown() -> None:
    assert "secret" not in repr(read("--router", "a:1"))


def test_tls_needs_certificate_and_key_together() -> None:
    settings = read("--router", "a:1", "--tls-cert", "cert.pem")
    with pytest.raises(InvalidRequest, match="together"):
        _ = settings.tls
    assert read("--router", "a:1").tls is None
    ours = read("--router", "a:1", "--tls-cert", "c", "--tls-key", "k", "--router-ca", "ca").tls
    assert ours is not None
    assert ours.cert == Path("c")


@pytest.mark.parametrize(
    ("flags", "address"),
    [
        (("--listen", "127.0.0.1:0"), "127.0.0.1:99"),
        (("--listen", "0.0.0.0:0", "--advertise", "runner.example:7071"), "runner.example:7071"),
    ],
)
def test_advertised_address(flags: tuple[str, ...], address: str) -> None:
    assert read("--router", "a:1", *flags).address(99) == address


def test_wildcard_is_advertised_as_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert read("--router", "a:1", "--listen", "[::]:0").address(5) == "box:5"


@pytest.mark.parametrize("rank", [8, 64, 256])
def test_host_memory_of_a_cpu_holds_the_largest_adapter_that_may_be_uploaded(
    tmp_path: Path, rank: int
) -> None:
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    settings = read("--router", "a:1", "--max-rank", str(rank), "--model", str(tmp_path))
    found = _options(settings, "cpu")
    dimensions = read_config(tmp_path)
    elements = page_tokens(dimensions, rank) * dimensions.kv_elements
    shape = ImageShape(BaseModel.from_config(tmp_path), "float32", elements, rank)
    modules = {(i, name): ModuleSpec(rank, 1.0) for i in range(30) for name in shape.base.modules}
    largest = lay_out(shape.base, modules, elements).pages * shape.page_bytes
    assert found.host_cache_bytes >= max(2 * largest, 64 << 20)
    asked = read("--router", "a:1", "--host-cache-bytes", "12345", "--model", str(tmp_path))
    assert _options(asked, "cpu").host_cache_bytes == 12345
    assert _options(settings, "cuda").host_cache_bytes == 4 << 30


def test_tables_and_kernels_lie_in_the_cache_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = ("--router", "a:1")
    assert _options(read(*router), "cuda").tables == Path("cache/tables")
    assert _options(read(*router, "--tables", "mine"), "cuda").tables == Path("mine")
    monkeypatch.setenv("GRANATUM_TABLES", "theirs")
    assert _options(read(*router), "cuda").tables == Path("theirs")

    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    del os.environ["TRITON_CACHE_DIR"]
    keep_kernels(Path("cache"))
    assert os.environ["TRITON_CACHE_DIR"] == str(Path.cwd() / "cache" / "kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", "chosen")
    keep_kernels(Path("cache"))
    assert os.environ["TRITON_CACHE_DIR"] == "chosen"
