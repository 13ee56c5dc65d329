"""What runners and operators may say to a router, over the wire."""

import math

import pytest
from router_box import CLUSTER_KEY, Box
from wire_adapters import error_of

from granatum.v1.cluster_pb2 import (
    DeregisterRequest,
    DrainRunnerRequest,
    HeartbeatRequest,
    ResumeRunnerRequest,
    Runner,
)
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import Code, GranatumError, PreconditionFailed
from granatum.v1.transport import bearer

ODD_IDS = ["", "a b", "é", "a\x00", "x" * 129, "x" * 100_000, "a\n", "'\"", "{a}"]


async def beat(box: Box, record: Runner) -> None:
    stub = RegistryServiceStub(box.channel())
    request = HeartbeatRequest(runner=record)
    await stub.Heartbeat(request, metadata=bearer(CLUSTER_KEY), timeout=5)


def names(error: GranatumError, field: str) -> bool:
    return error.code is Code.INVALID_ARGUMENT and field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch", 2**32 - 1),
        ("total_pages", 2**32 - 1),
        ("page_tokens", 2**32 - 1),
        ("max_context", 2**32 - 1),
        ("max_rank", 2**32 - 1),
        ("max_adapter_elements", 2**64 - 1),
        ("free_pages", 10_001),
        ("reclaimable_pages", 2**32 - 1),
        ("address", "x:99999"),
        ("address", "x y:1"),
        ("address", "x:１"),
        ("address", "x" * 256 + ":1"),
        ("model", "m" * 2000),
        ("instance", "i" * 129),
        ("trouble", "t" * 5000),
        ("resident_adapters", ["d"] * 70_000),
        ("resident_adapters", ["d" * 129]),
        *(("id", id_) for id_ in ODD_IDS),
    ],
)
async def test_a_heartbeat_that_no_runner_can_mean_names_its_field(
    box: Box, field: str, value: object
) -> None:
    await box.router()
    record = (await box.runner("a")).record()
    record.id = "b"
    if isinstance(value, list):
        record.resident_adapters.extend(value)
    else:
        setattr(record, field, value)
    assert names(await error_of(beat(box, record)), f"runner.{field}")
    assert set(await box.statuses()) == {"a"}


@pytest.mark.parametrize("id_", ODD_IDS)
async def test_an_id_that_no_runner_can_have_is_refused(box: Box, id_: str) -> None:
    await box.router()
    registry = RegistryServiceStub(box.channel())
    cluster, admin, ours = box.cluster(), bearer(box.admin), bearer(CLUSTER_KEY)
    calls = (
        cluster.DrainRunner(DrainRunnerRequest(runner_id=id_), metadata=admin, timeout=5),
        cluster.ResumeRunner(ResumeRunnerRequest(runner_id=id_), metadata=admin, timeout=5),
        registry.Deregister(DeregisterRequest(runner_id=id_), metadata=ours, timeout=5),
    )
    for call in calls:
        assert names(await error_of(call), "runner_id")


async def test_the_second_of_two_runners_with_one_id_is_refused(box: Box) -> None:
    await box.router()
    first = (await box.runner("b")).record()
    first.id = "a"
    second = Runner()
    second.CopyFrom(first)
    first.instance, second.instance, second.address = "1", "2", "elsewhere:1"
    await beat(box, first)
    for _ in range(2):
        error = await error_of(beat(box, second))
        assert isinstance(error, PreconditionFailed)
        assert error.reason == "DUPLICATE_RUNNER"
        assert first.address in error.message
        assert "elsewhere:1" in error.message
    stub = RegistryServiceStub(box.channel())
    goodbye = DeregisterRequest(runner_id="a", instance="2")
    await stub.Deregister(goodbye, metadata=bearer(CLUSTER_KEY), timeout=5)
    assert (await box.statuses())["a"].runner.address == first.address
    assert math.isfinite((await box.statuses())["a"].heartbeat_age_s)
