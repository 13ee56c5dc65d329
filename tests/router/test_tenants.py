"""Over the wire: an adapter that is not published does not exist for any other tenant."""

import asyncio
import random

import pytest
from router_box import CLUSTER_KEY, Box
from scripted_runner import Script
from wire_adapters import adapter_files, error_of, generated, upload, upload_requests

from granatum.router.services import keys_file
from granatum.router.services.keys_file import Identity
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.cluster_pb2 import (
    DrainRunnerRequest,
    HeartbeatRequest,
    ResumeRunnerRequest,
)
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import AlreadyExists, Code, NotFound, PreconditionFailed
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.transport import bearer

NEVER = {"digest": "sha256:" + "0" * 64, "stable": "unstable"}
"""What nobody ever had, called as the adapter is called."""


@pytest.fixture
async def shared(box: Box) -> tuple[Box, str, pb.Adapter]:
    """A box, another tenant's key, and acme's private adapter with an alias."""
    other = box.tenant("globex")
    await box.router()
    await box.runner("a")
    adapter = (await upload(box, box.acme, "bot")).adapter
    request = pb.SetAliasRequest(alias="stable", adapter="bot@1")
    await box.adapters().SetAlias(request, metadata=bearer(box.acme), timeout=5)
    return box, other, adapter


async def test_an_upload_is_described_as_it_is(box: Box) -> None:
    await box.router()
    first = await upload(box, box.acme, "bot")
    assert first.created
    assert not (await upload(box, box.acme, "bot")).created
    second = await upload(box, box.acme, "bot", seed=2)
    assert (first.adapter.version, second.adapter.version) == (1, 2)
    shown = await box.adapters().GetAdapter(
        pb.GetAdapterRequest(adapter="bot@1"), metadata=bearer(box.acme)
    )
    assert shown.adapter == first.adapter
    assert (shown.adapter.tenant, shown.adapter.name) == ("acme", "bot")
    assert shown.adapter.digest.startswith("sha256:")
    assert shown.adapter.size_bytes == sum(map(len, adapter_files().values()))
    assert (shown.adapter.max_rank, list(shown.adapter.target_modules)) == (2, ["q_proj"])
    assert shown.adapter.visibility == pb.VISIBILITY_PRIVATE
    assert shown.adapter.create_time.seconds > 1_700_000_000


async def test_a_listing_comes_in_pages(box: Box) -> None:
    await box.router()
    for name in ("b", "a", "c"):
        await upload(box, box.acme, name)
    stub, names, token = box.adapters(), [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=2, page_token=token)
        page = await stub.ListAdapters(request, metadata=bearer(box.acme), timeout=5)
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert names == ["a", "b", "c"]
    request = pb.ListAdaptersRequest(page_size=1001)
    error = await error_of(stub.ListAdapters(request, metadata=bearer(box.acme)))
    assert "page_size" in str(error)


@pytest.mark.parametrize("case", ["no header", "two headers", "big chunk", "nothing"])
async def test_an_upload_out_of_order_is_refused(box: Box, case: str) -> None:
    await box.router()
    header, *chunks = upload_requests("bot", adapter_files())
    requests = {
        "no header": chunks,
        "two headers": [header, header],
        "big chunk": [header, pb.UploadAdapterRequest(chunk=bytes((1 << 20) + 1))],
        "nothing": [],
    }[case]
    call = box.adapters().UploadAdapter(iter(requests), metadata=bearer(box.acme), timeout=5)
    assert (await error_of(call)).code is Code.INVALID_ARGUMENT
    listed = await box.adapters().ListAdapters(pb.ListAdaptersRequest(), metadata=bearer(box.acme))
    assert not listed.adapters


@pytest.mark.parametrize("how", ["bot", "bot@1", "stable", "digest", "acme/bot", "acme/bot@1"])
async def test_another_tenants_adapter_cannot_be_used_by_any_name(
    shared: tuple[Box, str, pb.Adapter], how: str
) -> None:
    box, other, adapter = shared
    reference = adapter.digest if how == "digest" else how
    assert await generated(box, box.acme, reference) == "acme/bot@1"
    before = len(box.runners["a"].submissions)
    error = await error_of(generated(box, other, reference))
    never = await error_of(generated(box, other, NEVER.get(how, how.replace("bot", "bat"))))
    assert isinstance(error, NotFound)
    assert isinstance(never, NotFound)
    assert error.reason == never.reason
    assert len(box.runners["a"].submissions) == before
    get = pb.GetAdapterRequest(adapter=reference)
    error = await error_of(box.adapters().GetAdapter(get, metadata=bearer(other)))
    assert isinstance(error, NotFound)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("DeleteAdapter", pb.DeleteAdapterRequest(adapter="bot")),
        ("DeleteAdapter", pb.DeleteAdapterRequest(adapter="bot@1")),
        ("SetAlias", pb.SetAliasRequest(alias="mine", adapter="bot")),
        ("SetAlias", pb.SetAliasRequest(alias="stable", adapter="bot@1")),
        ("DeleteAlias", pb.DeleteAliasRequest(alias="stable")),
        ("SetVisibility", pb.SetVisibilityRequest(name="bot", visibility=pb.VISIBILITY_PUBLISHED)),
    ],
)
async def test_another_tenants_adapter_cannot_be_changed(
    shared: tuple[Box, str, pb.Adapter], method: str, request_: object
) -> None:
    box, other, _ = shared
    call = getattr(box.adapters(), method)(request_, metadata=bearer(other), timeout=5)
    assert isinstance(await error_of(call), NotFound)
    assert await generated(box, box.acme, "stable") == "acme/bot@1"


async def test_another_tenants_adapters_are_not_listed_and_names_do_not_clash(
    shared: tuple[Box, str, pb.Adapter],
) -> None:
    box, other, adapter = shared
    stub = box.adapters()
    listed = await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=bearer(other))
    assert not listed.adapters
    mine = await upload(box, other, "bot")
    assert (mine.adapter.tenant, mine.adapter.version) == ("globex", 1)
    assert mine.adapter.digest == adapter.digest
    assert await generated(box, other, adapter.digest) == "globex/bot@1"
    assert await generated(box, other, "bot") == "globex/bot@1"
    await stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter="bot"), metadata=bearer(other))
    assert await generated(box, box.acme, "bot") == "acme/bot@1"
    assert isinstance(await error_of(generated(box, other, adapter.digest)), NotFound)


async def test_a_published_adapter_is_everyones_to_use_and_nobody_elses_to_change(
    shared: tuple[Box, str, pb.Adapter],
) -> None:
    box, other, _ = shared
    stub = box.adapters()
    publish = pb.SetVisibilityRequest(name="bot", visibility=pb.VISIBILITY_PUBLISHED)
    await stub.SetVisibility(publish, metadata=bearer(box.acme))
    assert await generated(box, other, "acme/bot") == "acme/bot@1"
    assert isinstance(await error_of(generated(box, other, "bot")), NotFound)
    delete = pb.DeleteAdapterRequest(adapter="bot")
    assert isinstance(await error_of(stub.DeleteAdapter(delete, metadata=bearer(other))), NotFound)
    publish.visibility = pb.VISIBILITY_PRIVATE
    await stub.SetVisibility(publish, metadata=bearer(box.acme))
    assert isinstance(await error_of(generated(box, other, "acme/bot")), NotFound)


async def test_deletion_counts_at_once(shared: tuple[Box, str, pb.Adapter]) -> None:
    box, _, _ = shared
    assert await generated(box, box.acme, "bot") == "acme/bot@1"
    delete = pb.DeleteAdapterRequest(adapter="bot")
    answer = await box.adapters().DeleteAdapter(delete, metadata=bearer(box.acme))
    assert answer.versions_deleted == 1
    for reference in ("bot", "stable"):
        assert isinstance(await error_of(generated(box, box.acme, reference)), NotFound)


async def test_a_runner_of_another_model_is_refused_with_both_named(box: Box) -> None:
    await box.router()
    runner = await box.runner("a")
    record = runner.record()
    record.id, record.model_fingerprint = "b", "f" * 64
    stub = RegistryServiceStub(box.channel())
    request = HeartbeatRequest(runner=record)
    error = await error_of(stub.Heartbeat(request, metadata=bearer(CLUSTER_KEY), timeout=5))
    assert isinstance(error, PreconditionFailed)
    assert error.reason == "MODEL_MISMATCH"
    assert "scripted" in error.message
    assert set(await box.statuses()) == {"a"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", ""), ("id", "a b"), ("address", "nowhere"), ("max_batch", 0), ("page_tokens", 0)],
)
async def test_a_runner_that_says_nonsense_is_refused(box: Box, field: str, value: object) -> None:
    await box.router()
    record = (await box.runner("a")).record()
    record.id = "b"
    setattr(record, field, value)
    stub = RegistryServiceStub(box.channel())
    request = HeartbeatRequest(runner=record)
    error = await error_of(stub.Heartbeat(request, metadata=bearer(CLUSTER_KEY), timeout=5))
    assert error.code is Code.INVALID_ARGUMENT
    assert f"runner.{field}" in error.message


async def test_a_runner_that_says_goodbye_is_gone(box: Box) -> None:
    await box.router()
    runner = await box.runner("a")
    runner.script.silent = True
    await runner.deregister()
    assert await box.statuses() == {}
    for request, method in (
        (DrainRunnerRequest(runner_id="a"), "DrainRunner"),
        (ResumeRunnerRequest(runner_id="a"), "ResumeRunner"),
    ):
        call = getattr(box.cluster(), method)(request, metadata=bearer(box.admin), timeout=5)
        assert isinstance(await error_of(call), NotFound)


@pytest.mark.parametrize(
    ("bound", "asked", "given"),
    [(0, 0, 0), (0, -5, -5), (7, 7, 7), (-3, 0, -3), (-3, -4, -4), (0, 1, None), (7, 8, None)],
)
async def test_a_key_bounds_its_priority(
    box: Box, bound: int, asked: int, given: int | None
) -> None:
    key = keys_file.add(box.keys, Identity("globex", bound))
    await box.router()
    await box.runner("a")
    request = GenerateRequest(prompt="hi", priority=asked, stop=StopConditions(max_tokens=1))
    call = box.inference().Generate(request, metadata=bearer(key), timeout=10)
    if given is None:
        error = await error_of(call.read())
        assert error.code is Code.INVALID_ARGUMENT
        assert error.message.startswith(f"priority: {asked} is above {bound}")
        assert not box.runners["a"].submissions
    else:
        assert [response async for response in call]
        assert box.runners["a"].submissions[0].request.priority == given


async def test_a_request_id_that_is_taken_says_when_to_try_again(box: Box) -> None:
    await box.router(lease_s=1.5)
    await box.runner("a", script=Script(step_s=0.01))
    request = GenerateRequest(prompt="hi", request_id="mine", stop=StopConditions(max_tokens=1000))
    stub = box.inference()
    running = stub.Generate(request, metadata=bearer(box.acme), timeout=10)
    await running.read()
    error = await error_of(stub.Generate(request, metadata=bearer(box.acme), timeout=10).read())
    assert isinstance(error, AlreadyExists)
    assert error.retry_after_s == 1.5
    running.cancel()


async def test_a_tenant_at_its_bound_leaves_room_for_others(box: Box) -> None:
    other = box.tenant("globex")
    await box.router(max_running_per_tenant=2)
    runner = await box.runner("a", max_batch=4, script=Script(step_s=0.005))
    streams = asyncio.create_task(box.generate_many(8, 30))
    async with asyncio.timeout(5):
        while len(runner.active) < 2:
            await asyncio.sleep(0.005)
    assert await generated(box, other, "") == ""
    assert not streams.done()
    assert len(await streams) == 8
    assert runner.peak <= 3


async def test_an_adapter_that_no_runner_can_serve_is_refused_with_both_ranks(box: Box) -> None:
    await box.router()
    runner = await box.runner("a")
    await upload(box, box.acme, "bot")  # of rank 2
    usual = runner.record
    limited = usual()
    limited.max_rank = 1
    runner.record = lambda: limited  # type: ignore[method-assign]
    await runner.heartbeat()
    error = await error_of(generated(box, box.acme, "bot"))
    assert isinstance(error, PreconditionFailed)
    assert error.reason == "ADAPTER_NOT_SERVABLE"
    assert "rank 2" in error.message
    assert "rank 1" in error.message
    assert await generated(box, box.acme, "") == ""


async def test_calls_that_come_and_go_hold_up_nobody(box: Box) -> None:
    """With leases that outlast the test: whatever they brought is given back, not left to lapse."""
    other = box.tenant("globex")
    await box.router(lease_s=60)
    await box.runner("a", max_batch=2, script=Script(step_s=0.002))
    stub, chance = box.inference(), random.Random(5)

    async def come_and_go(n: int) -> None:
        request = GenerateRequest(
            prompt="hi", request_id=f"r{n}", stop=StopConditions(max_tokens=1000)
        )
        await asyncio.sleep(chance.uniform(0, 0.5))
        call = stub.Generate(request, metadata=bearer(box.acme), timeout=10)
        await asyncio.sleep(chance.choice([0, 0.001, 0.003, 0.01]))
        call.cancel()

    await asyncio.gather(*(come_and_go(n) for n in range(100)))
    assert await asyncio.wait_for(generated(box, other, ""), 2) == ""
    await box.idle()
    assert not len(box.routers[0]._admission._line)


async def test_a_tenant_with_one_request_passes_anothers_queue(box: Box) -> None:
    other = box.tenant("globex")
    await box.router()
    runner = await box.runner("a", max_batch=1, script=Script(step_s=0.002))
    streams = asyncio.create_task(box.generate_many(30, 10))
    async with asyncio.timeout(10):
        while len(box.routers[0]._admission._line) < 20:
            await asyncio.sleep(0.002)
    before = len(runner.submissions)
    assert await generated(box, other, "") == ""
    assert len(runner.submissions) - before <= 5
    assert not streams.done()
    await streams
