"""What the client returns: frozen records, made from the wire's messages."""

from dataclasses import dataclass
from datetime import UTC, datetime

from granatum.v1 import adapters_pb2, cluster_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` may be empty while a character or a stop string is undecided."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float, str], ...] = ()
    """The most likely tokens as (id, log probability, text), best first."""

    @classmethod
    def of(cls, token: inference_pb2.Token) -> "Token":
        """From the wire."""
        top = tuple((entry.id, entry.value, entry.text) for entry in token.logprob.top)
        chosen = token.logprob.value if token.HasField("logprob") else None
        return cls(token.id, token.text, chosen, top)


@dataclass(frozen=True, slots=True)
class Start:
    """What was decided before the first token."""

    request_id: str
    adapter: str
    """`tenant/name@version`; empty for the base model."""
    digest: str
    """`sha256:...`; empty for the base model."""
    runner: str

    @classmethod
    def of(cls, start: inference_pb2.GenerationStart) -> "Start":
        """From the wire."""
        return cls(start.request_id, start.adapter, start.adapter_digest, start.runner_id)


@dataclass(frozen=True, slots=True)
class End:
    """How a generation ended. Times in seconds since the request reached the router."""

    reason: str
    """`stop` or `length`."""
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    resumptions: int
    runner: str

    @classmethod
    def of(cls, end: inference_pb2.GenerationEnd) -> "End":
        """From the wire."""
        return cls(
            reason=inference_pb2.FinishReason.Name(end.reason)
            .removeprefix("FINISH_REASON_")
            .lower(),
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            queue_s=end.timings.queue_s,
            first_token_s=end.timings.first_token_s,
            total_s=end.timings.total_s,
            resumptions=end.timings.resumptions,
            runner=end.runner_id,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation."""

    tokens: tuple[Token, ...]
    start: Start
    end: End

    @property
    def text(self) -> str:
        """The tokens' text."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True, slots=True)
class ProofResult:
    """How far the fleet's log probabilities are from the trainer's, in nats."""

    tokens: int
    mean: float
    """Under the adapter."""
    max: float
    base_mean: float
    """Under the base model alone: the noise."""
    base_max: float
    effect: float
    """The mean difference that the adapter makes, by the trainer."""
    bound: float
    """The most that `mean` may be."""
    time: datetime

    @classmethod
    def of(cls, result: adapters_pb2.ProofResult) -> "ProofResult":
        """From the wire."""
        return cls(
            tokens=result.tokens,
            mean=result.mean,
            max=result.max,
            base_mean=result.base_mean,
            base_max=result.base_max,
            effect=result.effect,
            bound=result.bound,
            time=result.time.ToDatetime(UTC),
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether an adapter is what its trainer saw; `reason` says why not."""

    result: ProofResult
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter."""

    tenant: str
    name: str
    version: int
    digest: str
    size_bytes: int
    max_rank: int
    target_modules: tuple[str, ...]
    created: datetime
    published: bool
    aliases: tuple[str, ...]
    base_model: str = ""
    """The base model that it was trained for, as its trainer called it; empty: unknown."""
    proof: ProofResult | None = None
    """What its last proof found; None: no upload of it brought one."""
    own_chat: bool = False
    """Whether it brings a chat template or end tokens of its own, which chats with it use."""

    @classmethod
    def of(cls, adapter: adapters_pb2.Adapter) -> "Adapter":
        """From the wire."""
        return cls(
            tenant=adapter.tenant,
            name=adapter.name,
            version=adapter.version,
            digest=adapter.digest,
            size_bytes=adapter.size_bytes,
            max_rank=adapter.max_rank,
            target_modules=tuple(adapter.target_modules),
            created=adapter.create_time.ToDatetime(UTC),
            published=adapter.visibility == adapters_pb2.VISIBILITY_PUBLISHED,
            aliases=tuple(adapter.aliases),
            base_model=adapter.base_model,
            proof=ProofResult.of(adapter.proof) if adapter.HasField("proof") else None,
            own_chat=adapter.own_chat,
        )

    @property
    def full_name(self) -> str:
        """`tenant/name@version`."""
        return f"{self.tenant}/{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Upload:
    """The result of an upload. `created` is False if the newest version already had the bytes."""

    adapter: Adapter
    created: bool


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """A runner as the routers see it."""

    id: str
    address: str
    model: str
    max_batch: int
    max_context: int
    total_pages: int
    free_pages: int
    reclaimable_pages: int
    page_tokens: int
    sequences: int
    reserved: int
    """Placements on the runner, by all routers, that are not released."""
    resident_adapters: tuple[str, ...]
    decode_steps: int
    decode_sequences: int
    """Decoded sequences, summed over the decode steps."""
    decode_adapters: int
    """Distinct adapters of decoded sequences, summed over the decode steps."""
    adapter_loads: int
    draining: bool
    heartbeat_age_s: float
    max_rank: int
    """The highest rank of an adapter that the runner serves."""
    trouble: str
    """Why the runner cannot load adapters now; empty if it can."""

    @classmethod
    def of(cls, status: cluster_pb2.RunnerStatus) -> "RunnerStatus":
        """From the wire."""
        runner = status.runner
        return cls(
            id=runner.id,
            address=runner.address,
            model=runner.model,
            max_batch=runner.max_batch,
            max_context=runner.max_context,
            total_pages=runner.total_pages,
            free_pages=runner.free_pages,
            reclaimable_pages=runner.reclaimable_pages,
            page_tokens=runner.page_tokens,
            sequences=runner.sequences,
            reserved=status.reserved,
            resident_adapters=tuple(runner.resident_adapters),
            decode_steps=runner.decode_steps,
            decode_sequences=runner.decode_sequences,
            decode_adapters=runner.decode_adapters,
            adapter_loads=runner.adapter_loads,
            draining=runner.draining,
            heartbeat_age_s=status.heartbeat_age_s,
            max_rank=runner.max_rank,
            trouble=runner.trouble,
        )
