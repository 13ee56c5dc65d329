"""Everything that a runner can be told, by flags or by GRANATUM_RUNNER_* in the environment."""

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from granatum.models.folder import model_folder
from granatum.service import settings as shared
from granatum.v1.errors import InvalidRequest
from granatum.v1.transport import Tls, reachable

MAX_BATCH = 1024
"""The largest batch that a runner can be given."""


class RunnerSettings(BaseSettings):
    """A runner's settings; in the environment --max-batch is GRANATUM_RUNNER_MAX_BATCH."""

    model_config = shared.settings_of("runner")

    model: Path = Field(description="the base model: a Hugging Face directory")
    store: shared.StoreUrl
    router: Annotated[tuple[str, ...], NoDecode] = Field(
        description="host:port of a router to report to; several with commas or repeated"
    )
    cache_dir: Path = Field(
        description="local directory for adapters, ready to be loaded, and for compiled kernels"
    )
    tables: Path | None = Field(
        None,
        validation_alias=AliasChoices("tables", "GRANATUM_TABLES"),
        description="what granatum tune has measured; absent: the folder tables in --cache-dir",
    )
    cluster_key: shared.ClusterKey
    listen: shared.ListenAddress = "127.0.0.1:7071"
    advertise: str | None = Field(
        None, description="host:port where routers reach it; absent: from --listen"
    )
    runner_id: str | None = Field(
        None, description="unique in the fleet; absent: the address that it advertises"
    )

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<n>"
    )
    max_batch: int | None = Field(
        None, ge=1, le=MAX_BATCH, description="sequences at a time; absent: 64, on a CPU 8"
    )
    max_rank: int = Field(64, ge=1, le=256, description="the largest rank of an adapter")
    max_context: int | None = Field(
        None, ge=2, description="tokens of a sequence; absent: as many as the model allows"
    )
    random_weights: bool = Field(
        False, description="weights drawn at random instead of the model's: for measurements alone"
    )
    prefill_tokens: int = Field(
        512, ge=16, description="rows of one step, decodes and prompt chunks together"
    )
    arena_bytes: shared.Size | None = Field(
        None, gt=0, description="memory for KV and adapters; absent: what the device has left"
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="share of the GPU's memory to use, weights included"
    )
    host_cache_bytes: shared.Size | None = Field(
        None,
        gt=0,
        description="pinned host memory for adapters; absent: 4 GiB, on a CPU room for four of the "
        "largest adapters and at least 64 MiB",
    )
    disk_cache_bytes: shared.Size = Field(
        shared.Size(64 << 30),
        gt=0,
        description="the most that --cache-dir holds; what was used longest ago goes first",
    )
    grace_s: float = Field(10.0, ge=0, description="seconds to hand streams back at a stop")

    tls_cert: shared.Certificate = None
    tls_key: shared.CertificateKey = None
    tls_ca: Path | None = Field(None, description="PEM roots; demands certificates of routers")
    router_ca: Path | None = Field(None, description="PEM roots of the routers' certificates")
    router_cert: Path | None = Field(None, description="PEM certificate to show to routers")
    router_key: Path | None = Field(None, description="PEM key of --router-cert")
    insecure: shared.Insecure = False

    @field_validator("router", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(a.strip() for part in parts for a in str(part).split(",") if a.strip())

    @field_validator("router")
    @classmethod
    def _check_routers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one router, host:port")
        return value

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: Path) -> Path:
        try:
            return model_folder(value)
        except InvalidRequest as error:
            raise ValueError(error.message) from error

    @property
    def tls(self) -> Tls | None:
        """TLS of the listening port."""
        return Tls.given(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def router_tls(self) -> Tls | None:
        """TLS of the channels to routers."""
        return Tls.given(self.router_cert, self.router_key, self.router_ca)

    def address(self, port: int) -> str:
        """The host:port at which routers reach the runner, which listens on `port`."""
        if self.advertise is not None:
            return self.advertise
        return reachable(f"{self.listen.rpartition(':')[0]}:{port}")
