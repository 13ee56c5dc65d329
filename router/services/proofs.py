"""Proofs: the fleet computes what an adapter's trainer saw, by the path of every request.

The answers' tokens are given, so each log probability is that of the trainer's token. Nothing else
differs from a tenant's request: the tenant's quotas count, the queue's order holds, and a sequence
that loses its runner goes on elsewhere.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from granatum.adapters_store.catalog.catalog import Version
from granatum.adapters_store.proof import ProofResult, compare
from granatum.router.services.quotas import Quotas
from granatum.router.services.resolver import Resolved
from granatum.router.streams.deadline import Deadline
from granatum.router.streams.request import AcceptedRequest, limit_priority, prepare
from granatum.router.streams.stream import Streams
from granatum.service.tasks import cancelled
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.adapters_pb2 import Proof, ProofPrompt
from granatum.v1.errors import DeadlineExceeded, InvalidRequest, Unavailable
from granatum.v1.inference_pb2 import (
    GenerateRequest,
    LogprobOptions,
    StopConditions,
    Token,
    TokenIds,
)

FORMAT = "granatum-proof/1"
MAX_PROMPTS = 16
MAX_TOKENS = 2048
"""Of a prompt and its answer."""
LEAST_SCORED = 16
"""Tokens of all answers: the mean of fewer distances is chance."""
WITHIN_S = 300.0
"""The longest that a proof may take; an upload must be committed within twice this time."""
_AT_A_TIME = 8
_ROUNDING = 1e-3
"""A log probability may be above 0 by this much."""

Scores = Sequence[float]


class Proofs:
    """Runs proofs as requests of the tenant that asks."""

    def __init__(self, streams: Streams, quotas: Quotas) -> None:
        self._streams = streams
        self._quotas = quotas

    async def run(
        self,
        tenant: str,
        max_priority: int,
        proof: Proof,
        version: Version,
        remaining_s: float | None,
    ) -> ProofResult:
        """Score a checked proof on a version and on the base model, within `remaining_s` seconds.

        Raises InvalidRequest for tokens that the model lacks or has no room for, DeadlineExceeded,
        and whatever a request of the tenant might get.
        """
        digest = f"sha256:{version.digest}"
        adapter = Resolved(digest, digest, version.max_rank, version.elements)
        within_s = WITHIN_S if remaining_s is None else min(remaining_s, WITHIN_S)
        deadline = Deadline.from_remaining(within_s)
        turns = asyncio.Semaphore(_AT_A_TIME)

        async def scores(place: int, prompt: ProofPrompt, on: Resolved) -> Scores:
            request = _request(tenant, max_priority, prompt, on)
            async with turns:
                with _prompt_named(f"proof.prompts[{place}].token_ids"):
                    return await self._score(request, deadline)

        kinds = (adapter, Resolved())
        asked = [scores(i, prompt, on) for on in kinds for i, prompt in enumerate(proof.prompts)]
        found = await _all(asked, deadline)
        count = len(proof.prompts)
        return compare(
            _joined(prompt.logprobs for prompt in proof.prompts),
            _joined(found[:count]),
            _joined(prompt.base_logprobs for prompt in proof.prompts),
            _joined(found[count:]),
            time.time(),
        )

    async def _score(self, request: AcceptedRequest, deadline: Deadline) -> Scores:
        """The log probabilities of a request's given tokens."""
        tokens: list[Token] = []
        with self._quotas.held(request.tenant, request.message.ByteSize()):
            stream = self._streams.open(request, deadline)
            async with aclosing(stream.responses()) as responses:
                async for response in responses:
                    tokens += response.tokens
        if tuple(token.id for token in tokens) != request.forced:
            raise Unavailable(
                "a runner made other tokens than it was given: it is of an older version; the "
                "operator must restart it with this one",
                reason="RUNNER_OUTDATED",
            )
        return [token.logprob.value for token in tokens]


def check_proof(proof: Proof) -> None:
    """Raise InvalidRequest unless a proof can be run.

    What a model alone knows, its vocabulary and its room, is checked by the runner.
    """
    if proof.format != FORMAT:
        raise _wrong("proof.format", f"give {FORMAT!r}, as examples/write_proof.py writes it")
    if not 1 <= len(proof.prompts) <= MAX_PROMPTS:
        raise _wrong("proof.prompts", f"{len(proof.prompts):,} are given: give 1 to {MAX_PROMPTS}")
    for place, prompt in enumerate(proof.prompts):
        _check_prompt(prompt, f"proof.prompts[{place}]")
    scored = sum(len(prompt.logprobs) for prompt in proof.prompts)
    if scored < LEAST_SCORED:
        raise _wrong(
            "proof.prompts",
            f"{scored} log probabilities are too few to judge by: give at least {LEAST_SCORED}",
        )


def result_message(result: ProofResult) -> pb.ProofResult:
    """A proof's figures for the wire."""
    message = pb.ProofResult(
        tokens=result.tokens,
        mean=result.mean,
        max=result.max,
        base_mean=result.base_mean,
        base_max=result.base_max,
        effect=result.effect,
        bound=result.bound,
    )
    message.time.FromMicroseconds(round(result.time * 1e6))
    return message


def _check_prompt(prompt: ProofPrompt, field: str) -> None:
    tokens = len(prompt.token_ids)
    if not 2 <= tokens <= MAX_TOKENS:
        raise _wrong(f"{field}.token_ids", f"{tokens:,} are given: give 2 to {MAX_TOKENS:,}")
    if not 1 <= prompt.first < tokens:
        raise _wrong(
            f"{field}.first", f"{prompt.first} is no place after the first of {tokens} tokens"
        )
    for name, values in (("logprobs", prompt.logprobs), ("base_logprobs", prompt.base_logprobs)):
        if len(values) != tokens - prompt.first:
            raise _wrong(
                f"{field}.{name}",
                f"{len(values):,} are given: give one for each of the {tokens - prompt.first} "
                "tokens from first on",
            )
        for at, value in enumerate(values):
            if not (math.isfinite(value) and value <= _ROUNDING):
                raise _wrong(
                    f"{field}.{name}[{at}]",
                    f"{value:g} is no log probability: give finite numbers of at most 0",
                )


def _request(tenant: str, max_priority: int, prompt: ProofPrompt, on: Resolved) -> AcceptedRequest:
    """A request for the prompt's answer as its output, with log probabilities."""
    answer = tuple(prompt.token_ids[prompt.first :])
    message = GenerateRequest(
        token_ids=TokenIds(ids=prompt.token_ids[: prompt.first]),
        stop=StopConditions(max_tokens=len(answer), ignore_eos=True),
        logprobs=LogprobOptions(),
    )
    limit_priority(message, max_priority)
    request_id = f"proof-{secrets.token_hex(16)}"
    prepare(message, tenant, request_id)
    return AcceptedRequest(
        tenant=tenant,
        request_id=request_id,
        message=message,
        adapter_digest=on.digest,
        adapter=on.name,
        rank=on.rank,
        elements=on.elements,
        forced=answer,
    )


async def _all(work: Iterable[Coroutine[Any, Any, Scores]], deadline: Deadline) -> list[Scores]:
    """All results, in order. The first failure, or the deadline, ends what is left."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        async with asyncio.timeout_at(deadline.give_up_at):
            return await asyncio.gather(*tasks)
    except TimeoutError:
        raise DeadlineExceeded(
            "the proof was not computed in time: try again when the fleet is less busy, or give "
            "fewer and shorter prompts",
            reason="PROOF_TOO_LATE",
        ) from None
    finally:
        await cancelled(*tasks)


@contextmanager
def _prompt_named(field: str) -> Iterator[None]:
    """Say which prompt a runner refuses: the caller does not know the runner's own fields."""
    try:
        yield
    except InvalidRequest as error:
        raise _wrong(field, error.message) from error


def _joined(parts: Iterable[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {what}", field=field)
