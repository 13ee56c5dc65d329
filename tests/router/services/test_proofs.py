"""Proofs over the wire: run as the tenant's requests, judged, and never a way around anything."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from router_box import Box
from scripted_runner import logprob_of
from wire_adapters import adapter_files, error_of, upload, upload_requests

from granatum.adapters_store.proof import LEAST_BOUND, MOST_BASE, NOISE_FACTOR, compare
from granatum.router.services import keys_file
from granatum.router.services.keys_file import Identity
from granatum.router.services.proofs import MAX_PROMPTS, MAX_TOKENS, check_proof
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.transport import bearer

NAN, INF = float("nan"), float("inf")


def prompt_of(ids: Sequence[int], first: int = 1) -> pb.ProofPrompt:
    """What the scripted runner's trainer would have written."""
    return pb.ProofPrompt(
        token_ids=ids,
        first=first,
        logprobs=[logprob_of(i, adapter=True) for i in ids[first:]],
        base_logprobs=[logprob_of(i, adapter=False) for i in ids[first:]],
    )


def good_proof() -> pb.Proof:
    prompts = [prompt_of(range(10 * n, 10 * n + 12), 1 + n) for n in range(4)]
    return pb.Proof(format="granatum-proof/1", prompts=prompts)


async def send(box: Box, key: str = "", seconds: float = 10) -> pb.UploadAdapterResponse:
    requests = upload_requests("bot", adapter_files(), proof=good_proof())
    return await box.adapters().UploadAdapter(
        requests, metadata=bearer(key or box.acme), timeout=seconds
    )


async def listed(box: Box) -> list[pb.Adapter]:
    request = pb.ListAdaptersRequest()
    response = await box.adapters().ListAdapters(request, metadata=bearer(box.acme), timeout=5)
    return list(response.adapters)


async def verify(box: Box, adapter: str, key: str = "") -> pb.VerifyAdapterResponse:
    request = pb.VerifyAdapterRequest(adapter=adapter, proof=good_proof())
    return await box.adapters().VerifyAdapter(request, metadata=bearer(key or box.acme), timeout=10)


async def test_a_proof_is_computed_and_kept(box: Box) -> None:
    await box.router()
    runner = await box.runner("a")
    adapter = (await send(box)).adapter
    assert adapter.proof.tokens == 11 + 10 + 9 + 8
    assert adapter.proof.mean < 1e-6
    assert adapter.proof.effect == pytest.approx(2.0)
    assert adapter.proof.bound == LEAST_BOUND
    assert adapter.proof.time.seconds > 1_700_000_000
    assert [a.proof for a in await listed(box)] == [adapter.proof]
    assert runner.wrong == []
    digests = {submission.adapter_digest for submission in runner.submissions}
    assert digests == {adapter.digest, ""}
    await box.idle()


async def test_a_refused_adapter_is_nowhere(box: Box) -> None:
    await box.router()
    (await box.runner("a")).script.off = -0.01
    error = await error_of(send(box))
    assert isinstance(error, InvalidRequest)
    assert (error.reason, error.field) == ("PROOF_FAILED", "header.proof")
    assert "off by 0.01 nats" in error.message
    assert not await listed(box)
    digest = box.runners["a"].submissions[0].adapter_digest
    for name in ("bot", digest):
        assert isinstance(await error_of(verify(box, name)), NotFound)
    # Without a proof nobody asks, and a later proof of the same version can be had.
    version = (await upload(box, box.acme, "bot")).adapter.version
    answer = await verify(box, "bot")
    assert not answer.passed
    assert answer.result.mean == pytest.approx(0.01, abs=1e-6)
    assert "off by 0.01 nats" in answer.reason
    box.runners["a"].script.off = 0.0
    assert (await verify(box, "bot")).passed
    again = await send(box)
    assert (again.created, again.adapter.version) == (False, version)
    assert (await listed(box))[0].proof == again.adapter.proof


async def test_without_a_runner_nothing_is_taken(box: Box) -> None:
    await box.router()
    error = await error_of(send(box))
    assert isinstance(error, Unavailable)
    assert error.reason == "NO_RUNNER"
    assert error.retry_after_s
    assert not await listed(box)
    await upload(box, box.acme, "bot")
    assert isinstance(await error_of(verify(box, "bot")), Unavailable)


async def test_a_proof_survives_runners_that_give_up_and_die(box: Box) -> None:
    await box.router()
    first = await box.runner("a")
    await box.runner("b")
    for runner in box.runners.values():
        runner.script.evict_after = 4
    uploading = asyncio.create_task(send(box))
    async with asyncio.timeout(10):
        while not first.submissions:
            await asyncio.sleep(0.005)
    await first.die()
    adapter = (await uploading).adapter
    assert adapter.proof.mean < 1e-6
    assert adapter.proof.tokens == 38
    assert all(runner.wrong == [] for runner in box.runners.values())


async def test_the_tenant_s_bounds_hold(box: Box) -> None:
    low = keys_file.add(box.keys, Identity("acme", max_priority=-5))
    await box.router(max_running_per_tenant=1, max_streams_per_tenant=9)
    runner = await box.runner("a")
    await send(box, low)
    assert runner.peak == 1
    assert {submission.request.priority for submission in runner.submissions} == {-5}
    runner.script.stalled = True
    request = GenerateRequest(prompt="x", stop=StopConditions(max_tokens=9))
    streams = [
        box.inference().Generate(request, metadata=bearer(box.acme), timeout=20) for _ in range(9)
    ]
    reading = [asyncio.ensure_future(stream.read()) for stream in streams]
    async with asyncio.timeout(10):
        while len(box.routers[0]._calls) < len(streams):
            await asyncio.sleep(0.005)
    error = await error_of(verify(box, "bot"))
    assert isinstance(error, Overloaded)
    assert error.reason == "TENANT_STREAMS"
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*reading, return_exceptions=True)


async def test_a_proof_that_takes_too_long_or_is_abandoned_leaves_nothing_running(
    box: Box,
) -> None:
    await box.router()
    runner = await box.runner("a")
    runner.script.stalled = True
    error = await error_of(send(box, seconds=1))
    assert isinstance(error, DeadlineExceeded)
    uploading = asyncio.ensure_future(send(box))
    begun = len(runner.submissions)
    async with asyncio.timeout(10):
        while len(runner.submissions) == begun:
            await asyncio.sleep(0.005)
    uploading.cancel()
    await box.idle()
    assert not await listed(box)


async def test_a_runner_that_heeds_no_given_tokens_proves_nothing(box: Box) -> None:
    await box.router()
    (await box.runner("a")).script.outdated = True
    error = await error_of(send(box))
    assert isinstance(error, Unavailable)
    assert error.reason == "RUNNER_OUTDATED"
    assert not await listed(box)


async def test_others_adapters_are_verified_only_if_published(box: Box) -> None:
    other = box.tenant("globex")
    await box.router()
    await box.runner("a")
    digest = (await send(box)).adapter.digest
    for name in ("acme/bot", digest):
        assert isinstance(await error_of(verify(box, name, other)), NotFound)
    request = pb.SetVisibilityRequest(name="bot", visibility=pb.VISIBILITY_PUBLISHED)
    await box.adapters().SetVisibility(request, metadata=bearer(box.acme), timeout=5)
    assert (await verify(box, "acme/bot", other)).passed


def _with(**changes: Any) -> pb.Proof:
    """A good proof, but for some fields of its second prompt."""
    proof = good_proof()
    for name, value in changes.items():
        if isinstance(value, list):
            proof.prompts[1].ClearField(name)  # type: ignore[arg-type]
            getattr(proof.prompts[1], name).extend(value)
        else:
            setattr(proof.prompts[1], name, value)
    return proof


def _logprobs(value: float) -> pb.Proof:
    proof = good_proof()
    proof.prompts[1].logprobs[2] = value
    return proof


FORMAT = "granatum-proof/1"
BAD: dict[str, Callable[[], tuple[pb.Proof, str]]] = {
    "empty": lambda: (pb.Proof(), "proof.format"),
    "another format": lambda: (pb.Proof(format="granatum-proof/2"), "proof.format"),
    "no prompts": lambda: (pb.Proof(format=FORMAT), "proof.prompts"),
    "too many": lambda: (
        pb.Proof(format=FORMAT, prompts=[prompt_of(range(5))] * (MAX_PROMPTS + 1)),
        "proof.prompts",
    ),
    "too little": lambda: (
        pb.Proof(format=FORMAT, prompts=[prompt_of(range(16))]),
        "proof.prompts",
    ),
    "one token": lambda: (_with(token_ids=[5]), "proof.prompts[1].token_ids"),
    "too long": lambda: (_with(token_ids=[5] * (MAX_TOKENS + 1)), "proof.prompts[1].token_ids"),
    "first at 0": lambda: (_with(first=0), "proof.prompts[1].first"),
    "first at the end": lambda: (_with(first=12), "proof.prompts[1].first"),
    "first beyond": lambda: (_with(first=2**32 - 1), "proof.prompts[1].first"),
    "one missing": lambda: (_with(logprobs=[-1.0] * 9), "proof.prompts[1].logprobs"),
    "one more": lambda: (_with(base_logprobs=[-1.0] * 11), "proof.prompts[1].base_logprobs"),
    "none of the base": lambda: (_with(base_logprobs=[]), "proof.prompts[1].base_logprobs"),
    "NaN": lambda: (_logprobs(NAN), "proof.prompts[1].logprobs[2]"),
    "infinite": lambda: (_logprobs(-INF), "proof.prompts[1].logprobs[2]"),
    "above 0": lambda: (_logprobs(0.5), "proof.prompts[1].logprobs[2]"),
    "above all": lambda: (_logprobs(INF), "proof.prompts[1].logprobs[2]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_proof_is_refused_by_field(name: str) -> None:
    proof, field = BAD[name]()
    with pytest.raises(InvalidRequest) as refused:
        check_proof(proof)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


async def test_a_bad_proof_is_refused_over_the_wire(box: Box) -> None:
    await box.router()
    await box.runner("a")
    requests = upload_requests("bot", adapter_files(), proof=_logprobs(NAN))
    call = box.adapters().UploadAdapter(requests, metadata=bearer(box.acme), timeout=10)
    assert (await error_of(call)).field == "proof.prompts[1].logprobs[2]"
    request = pb.VerifyAdapterRequest(adapter="bot")
    asked = box.adapters().VerifyAdapter(request, metadata=bearer(box.acme), timeout=10)
    assert (await error_of(asked)).field == "proof.format"
    assert box.runners["a"].submissions == []


@pytest.mark.parametrize(
    ("off", "base_off", "effect", "word"),
    [
        (0.0, 0.0, 1.0, ""),
        (LEAST_BOUND * 0.9, 0.0, 1.0, ""),
        (LEAST_BOUND * 1.1, 0.0, 1.0, "the adapter is off"),
        (0.09, 0.05, 1.0, ""),
        (0.11, 0.05, 1.0, "the adapter is off"),
        (0.0, MOST_BASE * 1.1, 1.0, "another base model"),
        (0.0, 0.0, LEAST_BOUND * 0.9, "cannot tell"),
        (0.04, 0.03, 0.05, "cannot tell"),
        (INF, 0.0, 1.0, "the adapter is off"),
        (NAN, 0.0, 1.0, "the adapter is off"),
        (0.0, NAN, 1.0, "another base model"),
    ],
)
def test_the_verdict(off: float, base_off: float, effect: float, word: str) -> None:
    assert NOISE_FACTOR == 2
    base = [-3.0, -4.0, -5.0]
    trained = [value + effect for value in base]
    result = compare(
        trained,
        [value - off for value in trained],
        base,
        [value + base_off for value in base],
        0.0,
    )
    assert (word in result.fault) if word else result.fault == ""
