"""Uploads over the wire: what the fleet cannot serve, too many, too slow, and fields by name."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from router_box import CLUSTER_KEY, Box
from uploading import BASE
from wire_adapters import adapter_files, error_of, upload, upload_requests

from granatum.adapters_store.limits import RunnerLimits
from granatum.adapters_store.store import AdapterStore
from granatum.router.services import access, uploads
from granatum.router.services.adapters import AdapterServicer
from granatum.router.services.uploads import Fleet, Pace, Seats, paced
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.cluster_pb2 import HeartbeatRequest, Runner, RunnerStatus
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import (
    DeadlineExceeded,
    InvalidAdapter,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from granatum.v1.transport import bearer


async def _heartbeat(box: Box, id_: str, **limits: int) -> None:
    record = box.runners["a"].record()
    record.id = id_
    for name, value in limits.items():
        setattr(record, name, value)
    request = HeartbeatRequest(runner=record)
    stub = RegistryServiceStub(box.channel())
    await stub.Heartbeat(request, metadata=bearer(CLUSTER_KEY), timeout=5)


@pytest.fixture
async def fleetless(box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    """A router without runners, which asks anew at each upload what runners there are."""
    monkeypatch.setattr(uploads, "_FRESH_S", -1.0)
    await box.router()
    await box.runner("a")
    box.runners["a"].script.silent = True
    await box.runners["a"].deregister()
    return box


async def _send(box: Box, rank: int, name: str = "bot") -> pb.UploadAdapterResponse:
    requests = upload_requests(name, adapter_files(rank=rank), 100_000)
    return await box.adapters().UploadAdapter(requests, metadata=bearer(box.acme), timeout=10)


async def test_a_rank_that_no_runner_serves_is_refused(fleetless: Box) -> None:
    box = fleetless
    await _send(box, 128, "before-any-runner")
    await _heartbeat(box, "narrow", max_rank=64)
    error = await error_of(_send(box, 128))
    assert isinstance(error, InvalidAdapter)
    assert "rank 128" in error.message
    assert "64" in error.message
    assert "--max-rank" in error.message
    await _send(box, 64)
    await _heartbeat(box, "wide", max_rank=128)
    await _send(box, 128)
    assert "rank 136" in (await error_of(_send(box, 136))).message


async def test_an_adapter_that_no_runner_has_room_for_is_refused(fleetless: Box) -> None:
    box = fleetless
    # q_proj of the box's model is 32 x 32: rank 9 is padded to 16, in A and in B.
    await _heartbeat(box, "small", max_rank=64, max_adapter_elements=16 * 64 - 1)
    await _heartbeat(box, "narrow", max_rank=8, max_adapter_elements=1 << 30)
    error = await error_of(_send(box, 9))
    assert isinstance(error, InvalidAdapter)
    assert f"{16 * 64:,}" in error.message
    await _send(box, 8)
    await _heartbeat(box, "small", max_rank=64, max_adapter_elements=16 * 64)
    await _send(box, 9)


async def test_what_the_fleet_serves_is_asked_once_a_second() -> None:
    statuses = [
        RunnerStatus(runner=Runner(max_rank=rank, max_adapter_elements=5)) for rank in (8, 8, 0)
    ]
    asked = []

    async def runners() -> list[RunnerStatus]:
        asked.append(1)
        await asyncio.sleep(0)
        return statuses

    fleet = Fleet(runners)
    for _ in range(2):  # at once, and a moment later
        answers = await asyncio.gather(*(fleet.limits() for _ in range(100)))
        assert all(set(limits) == {RunnerLimits(8, 5), RunnerLimits(0, 5)} for limits in answers)
    assert len(asked) == 1


async def test_while_the_registry_is_away_the_router_s_own_limit_counts() -> None:
    async def runners() -> list[RunnerStatus]:
        raise Unavailable("away")

    assert await Fleet(runners).limits() == ()


async def test_a_tenant_s_uploads_are_few_at_a_time_and_leave_others_theirs(box: Box) -> None:
    other = box.tenant("globex")
    await box.router()
    going_on = asyncio.Event()
    header, *chunks = upload_requests("bot", adapter_files())

    async def slowly() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield header
        await going_on.wait()
        for chunk in chunks:
            yield chunk

    stub = box.adapters()
    calls = [
        stub.UploadAdapter(slowly(), metadata=bearer(box.acme), timeout=20)
        for _ in range(uploads.MAX_OF_TENANT)
    ]
    scratch = box.folder / "store" / ".scratch"
    async with asyncio.timeout(10):
        while len(list(scratch.iterdir())) < uploads.MAX_OF_TENANT:
            await asyncio.sleep(0.01)
    error = await error_of(upload(box, box.acme, "bot"))
    assert isinstance(error, Overloaded)
    assert error.reason == "TOO_MANY_UPLOADS"
    assert error.retry_after_s
    assert str(uploads.MAX_OF_TENANT) in error.message
    await upload(box, other, "bot")
    going_on.set()
    assert [(await call).adapter.name for call in calls] == ["bot"] * len(calls)
    await upload(box, box.acme, "bot")


def test_seats_are_bounded_in_all_and_given_back() -> None:
    seats = Seats()
    taken = [seats.taken(f"tenant-{n}") for n in range(uploads.MAX_IN_ALL)]
    for seat in taken:
        seat.__enter__()
    with pytest.raises(Overloaded, match=str(uploads.MAX_IN_ALL)), seats.taken("late"):
        pass
    taken[0].__exit__(None, None, None)
    with seats.taken("late"):
        pass
    for seat in taken[1:]:
        seat.__exit__(None, None, None)
    assert not seats._taken


def _chunk(size: int) -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(chunk=bytes(size))


async def _every(seconds: float, size: int) -> AsyncIterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(header=pb.UploadHeader())
    while True:
        await asyncio.sleep(seconds)
        yield _chunk(size)


@pytest.mark.parametrize(
    ("seconds", "size", "pace", "reason"),
    [
        (60.0, 1000, Pace(stall_s=0.05), "UPLOAD_STALLED"),
        (0.01, 0, Pace(stall_s=0.05), "UPLOAD_STALLED"),  # empty chunks are no progress
        (0.01, 1, Pace(stall_s=5, grace_s=0.1, bytes_per_s=10_000), "UPLOAD_SLOW"),
    ],
)
async def test_an_upload_that_comes_too_slowly_is_given_up(
    seconds: float, size: int, pace: Pace, reason: str
) -> None:
    async def consume() -> None:
        async for _ in paced(_every(seconds, size), pace):
            pass

    with pytest.raises(DeadlineExceeded) as error:
        await asyncio.wait_for(consume(), 5)
    assert error.value.reason == reason


async def test_a_server_that_is_slow_itself_blames_nobody() -> None:
    async def at_once() -> AsyncIterator[pb.UploadAdapterRequest]:
        for _ in range(10):
            yield _chunk(10)

    pace = Pace(stall_s=0.05, grace_s=0.05, bytes_per_s=1e6)
    seen = 0
    async for _ in paced(at_once(), pace):
        seen += 1
        await asyncio.sleep(0.02)
    assert seen == 10


async def test_refused_uploads_are_heard_out_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def none() -> list[RunnerStatus]:
        return []

    went_on = 0

    async def sender() -> AsyncIterator[pb.UploadAdapterRequest]:
        nonlocal went_on
        yield _chunk(1)  # which is no header
        went_on += 1
        await asyncio.Event().wait()

    monkeypatch.setattr(uploads, "_DISCARD_S", 0.1)
    access._tenant.set("acme")
    no_proofs: Any = None
    adapters = AdapterServicer(AdapterStore.open("memory://", BASE), none, no_proofs)
    context: Any = None
    calls = [adapters.UploadAdapter(sender(), context) for _ in range(3 * uploads.MAX_OF_TENANT)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} <= {InvalidRequest, Overloaded}
    assert went_on == uploads.MAX_OF_TENANT


async def test_a_stalled_upload_is_given_up_over_the_wire(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(stall_s=0.2)
    monkeypatch.setattr("granatum.router.app.AdapterServicer", partial(AdapterServicer, pace=pace))
    await box.router()
    for begun in (0, 1, 3):
        requests = list(upload_requests("bot", adapter_files()))[:begun]

        async def stalls(sent: list[pb.UploadAdapterRequest] = requests) -> Any:
            for request in sent:
                yield request
            await asyncio.Event().wait()

        call = box.adapters().UploadAdapter(stalls(), metadata=bearer(box.acme), timeout=10)
        error = await error_of(call)
        assert isinstance(error, DeadlineExceeded)
        assert error.reason == "UPLOAD_STALLED"
    await upload(box, box.acme, "bot")
    assert not list((box.folder / "store" / ".scratch").iterdir())


def _declared(*names: str, **changes: Any) -> pb.UploadAdapterRequest:
    files = [
        pb.FileDeclaration(**{"name": name, "size_bytes": 1, "sha256": "0" * 64, **changes})
        for name in names
    ]
    return pb.UploadAdapterRequest(header=pb.UploadHeader(name="bot", files=files))


BOTH = ("adapter_config.json", "adapter_model.safetensors")
HEADER = next(iter(upload_requests("bot", adapter_files())))
UNKNOWN = pb.SetVisibilityRequest.FromString(b"\n\x03bot\x10\x63")  # visibility 99
BAD: dict[str, tuple[str, Any, str]] = {
    "get nothing": ("GetAdapter", pb.GetAdapterRequest(), "adapter"),
    "get nonsense": ("GetAdapter", pb.GetAdapterRequest(adapter="B\u00f6t"), "adapter"),
    "get a digest": ("GetAdapter", pb.GetAdapterRequest(adapter="sha256:x"), "adapter"),
    "get a version": ("GetAdapter", pb.GetAdapterRequest(adapter="bot@\u0661"), "adapter"),
    "get a tenant": ("GetAdapter", pb.GetAdapterRequest(adapter="A/bot"), "adapter"),
    "get much": ("GetAdapter", pb.GetAdapterRequest(adapter="x" * 100_000), "adapter"),
    "page size": ("ListAdapters", pb.ListAdaptersRequest(page_size=2**32 - 1), "page_size"),
    "page token": ("ListAdapters", pb.ListAdaptersRequest(page_token="\0"), "page_token"),
    "page of a digest": (
        "ListAdapters",
        pb.ListAdaptersRequest(page_token="sha256:" + "0" * 64),
        "page_token",
    ),
    "page of a name": ("ListAdapters", pb.ListAdaptersRequest(page_token="bot"), "page_token"),
    "page version": (
        "ListAdapters",
        pb.ListAdaptersRequest(page_token="bot@" + "9" * 5000),
        "page_token",
    ),
    "delete nothing": ("DeleteAdapter", pb.DeleteAdapterRequest(), "adapter"),
    "delete a digest": (
        "DeleteAdapter",
        pb.DeleteAdapterRequest(adapter="sha256:" + "0" * 64),
        "adapter",
    ),
    "delete another's": ("DeleteAdapter", pb.DeleteAdapterRequest(adapter="x/bot"), "adapter"),
    "no alias": ("SetAlias", pb.SetAliasRequest(adapter="bot"), "alias"),
    "bad alias": ("SetAlias", pb.SetAliasRequest(alias="a b", adapter="bot"), "alias"),
    "alias of nothing": ("SetAlias", pb.SetAliasRequest(alias="live"), "adapter"),
    "alias of nonsense": ("SetAlias", pb.SetAliasRequest(alias="live", adapter="@1"), "adapter"),
    "delete no alias": ("DeleteAlias", pb.DeleteAliasRequest(), "alias"),
    "delete bad alias": ("DeleteAlias", pb.DeleteAliasRequest(alias="\u2028"), "alias"),
    "publish nothing": (
        "SetVisibility",
        pb.SetVisibilityRequest(visibility=pb.VISIBILITY_PUBLISHED),
        "name",
    ),
    "publish nonsense": (
        "SetVisibility",
        pb.SetVisibilityRequest(name="bot@1", visibility=pb.VISIBILITY_PUBLISHED),
        "name",
    ),
    "unspecified": ("SetVisibility", pb.SetVisibilityRequest(name="bot"), "visibility"),
    "unknown": ("SetVisibility", UNKNOWN, "visibility"),
    "upload nothing": ("UploadAdapter", [], "header"),
    "upload an empty message": ("UploadAdapter", [pb.UploadAdapterRequest()], "header"),
    "upload under no name": (
        "UploadAdapter",
        [pb.UploadAdapterRequest(header=pb.UploadHeader())],
        "header.name",
    ),
    "upload no files": ("UploadAdapter", [_declared()], "header.files"),
    "upload many files": ("UploadAdapter", [_declared(*["x"] * 20_000)], "header.files"),
    "upload a few files": ("UploadAdapter", [_declared(*BOTH * 4)], "header.files"),
    "upload a path": ("UploadAdapter", [_declared("../x", BOTH[1])], "header.files"),
    "upload a size": ("UploadAdapter", [_declared(*BOTH, size_bytes=2**64 - 1)], "header.files"),
    "upload a digest": ("UploadAdapter", [_declared(*BOTH, sha256="\u0660" * 64)], "header.files"),
    "two headers": ("UploadAdapter", [HEADER, HEADER], "chunk"),
    "a long chunk": ("UploadAdapter", [HEADER, _chunk((1 << 20) + 1)], "chunk"),
    "too few bytes": ("UploadAdapter", [HEADER, _chunk(10)], "chunk"),
    "other bytes": ("UploadAdapter", [HEADER, _chunk(5000)], "chunk"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_field_is_refused_by_its_name(box: Box, case: str) -> None:
    method, request, field = BAD[case]
    await box.router()
    sent: Any = iter(request) if isinstance(request, list) else request
    call = getattr(box.adapters(), method)(sent, metadata=bearer(box.acme), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(_fields(caught.value)) == [field]
    assert len(caught.value.details() or "") < 1000


def _fields(error: grpc.aio.AioRpcError) -> Iterator[str]:
    status = rpc_status.from_call(error)
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            yield from (violation.field for violation in bad.field_violations)
