"""Everything that a router can be told, by flags or by GRANATUM_ROUTER_* in the environment."""

from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings

from granatum.adapters_store.limits import DEFAULT_LIMITS, UploadLimits
from granatum.router.placement.placement import Terms
from granatum.router.services.quotas import CallBounds
from granatum.router.streams.stream import Patience
from granatum.service import settings as shared
from granatum.v1.transport import Tls

_HEARTBEATS_PER_LEASE = 4
_LEAST_SHARE = 16
"""The least bound of one tenant in the queue: half of a short queue would be too few."""


class RouterSettings(BaseSettings):
    """A router's settings; in the environment --max-queue is GRANATUM_ROUTER_MAX_QUEUE."""

    model_config = shared.settings_of("router")

    listen: shared.ListenAddress = "127.0.0.1:7070"
    loopback: str | None = Field(
        None,
        description="a second host:port, of this machine alone and in plaintext: for runners here",
    )
    redis: str = Field("redis://127.0.0.1:6379/0", description="the registry's Redis server")
    store: shared.StoreUrl
    base_config: Path = Field(
        validation_alias=AliasChoices("model-config", "GRANATUM_ROUTER_MODEL_CONFIG"),
        description="the runners' model directory with all its files, or its config.json there",
    )
    base_name: str = Field(
        "",
        validation_alias=AliasChoices("model-name", "GRANATUM_ROUTER_MODEL_NAME"),
        description="what adapters call the base model, if its folder has another name",
    )
    keys: Path = Field(description="the JSON file of tenant and admin keys")
    cluster_key: shared.ClusterKey

    max_queue: int = Field(
        1024,
        ge=0,
        description="the most requests that wait for a runner; as many more may wait if each "
        "is its tenant's only one",
    )
    max_queued_per_tenant: int = Field(
        512,
        ge=0,
        description="the most waiting requests of one tenant; never over half of --max-queue or "
        "16, whichever is more",
    )
    max_running_per_tenant: int = Field(
        0, ge=0, description="the most requests of one tenant that run at a time; 0: no bound"
    )
    patience_s: float = Field(
        60.0, gt=0, description="seconds that a request without a deadline waits for a runner"
    )
    stall_s: float = Field(
        5.0, gt=0, description="seconds without a token until the runner's lease is looked at"
    )
    idle_s: float = Field(
        600.0, gt=0, description="seconds without a token after which a stream is given up"
    )
    silence_s: float = Field(
        5.0, ge=2, description="seconds without a word after which a link to a runner is dead"
    )
    unread_s: float = Field(
        60.0, gt=0, description="seconds after which a client that reads nothing is cut"
    )
    max_streams: int = Field(4096, gt=0, description="the most open streams of this router")
    max_streams_per_tenant: int = Field(
        1024, gt=0, description="the most open streams of one tenant on this router"
    )
    max_request_bytes_per_tenant: shared.Size = Field(
        shared.Size(64 << 20),
        gt=0,
        description="the most bytes of one tenant's open requests on this router",
    )
    heartbeat_s: float = Field(1.0, gt=0, description="seconds between a runner's heartbeats")
    lease_s: float = Field(
        6.0, gt=0, description="seconds until what a dead router held is free again"
    )
    grace_s: float = Field(30.0, ge=0, description="seconds that streams get to end at a stop")
    collect_s: float = Field(
        3600.0, gt=0, description="seconds between collections of blobs that nothing refers to"
    )

    max_adapter_bytes: shared.Size = Field(
        shared.Size(DEFAULT_LIMITS.max_bytes),
        gt=0,
        description="the largest adapter_model.safetensors to take",
    )
    max_adapter_rank: int = Field(
        DEFAULT_LIMITS.max_rank, gt=0, le=256, description="the highest rank of an adapter to take"
    )
    max_adapter_versions: int = Field(
        DEFAULT_LIMITS.max_versions, gt=0, description="the most versions that one tenant may keep"
    )
    max_adapter_aliases: int = Field(
        DEFAULT_LIMITS.max_aliases, gt=0, description="the most aliases that one tenant may keep"
    )
    max_adapter_bytes_per_tenant: shared.Size = Field(
        shared.Size(DEFAULT_LIMITS.max_tenant_bytes),
        gt=0,
        description="the most bytes that one tenant may keep",
    )

    tls_cert: shared.Certificate = None
    tls_key: shared.CertificateKey = None
    tls_ca: Path | None = Field(None, description="PEM roots; demands certificates of clients")
    runner_ca: Path | None = Field(None, description="PEM roots of the runners' certificates")
    runner_cert: Path | None = Field(None, description="PEM certificate to show to runners")
    runner_key: Path | None = Field(None, description="PEM key of --runner-cert")
    insecure: shared.Insecure = False

    @property
    def tls(self) -> Tls | None:
        """TLS of the listening port."""
        return Tls.given(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def runner_tls(self) -> Tls | None:
        """TLS of the channels to runners."""
        return Tls.given(self.runner_cert, self.runner_key, self.runner_ca)

    @property
    def terms(self) -> Terms:
        """What the registry is to keep, and for how long.

        One tenant gets a part of the queue at most, so that no tenant fills the queue alone.
        """
        return Terms(
            lease_s=self.lease_s,
            runner_lease_s=_HEARTBEATS_PER_LEASE * self.heartbeat_s,
            max_queue=self.max_queue,
            max_queued_per_tenant=min(
                self.max_queued_per_tenant, max(self.max_queue // 2, _LEAST_SHARE)
            ),
            max_running_per_tenant=self.max_running_per_tenant,
        )

    @property
    def limits(self) -> UploadLimits:
        """What a tenant may upload."""
        return UploadLimits(
            max_bytes=self.max_adapter_bytes,
            max_rank=self.max_adapter_rank,
            max_versions=self.max_adapter_versions,
            max_tenant_bytes=self.max_adapter_bytes_per_tenant,
            max_aliases=self.max_adapter_aliases,
        )

    @property
    def bounds(self) -> CallBounds:
        """The most that the router carries at a time."""
        return CallBounds(
            self.max_streams, self.max_streams_per_tenant, self.max_request_bytes_per_tenant
        )

    @property
    def patience(self) -> Patience:
        """How long streams wait."""
        return Patience(self.patience_s, self.stall_s, self.idle_s)
