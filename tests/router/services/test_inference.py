"""InferenceService over the wire, as a stranger's client sees it."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from router_box import Box

from granatum.v1.inference_pb2 import GenerateRequest, SamplingParams
from granatum.v1.transport import bearer


async def test_the_field_crosses_the_wire(box: Box) -> None:
    await box.router()
    request = GenerateRequest(prompt="x", sampling=SamplingParams(top_p=2))
    call = box.inference().Generate(request, metadata=bearer(box.acme), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = dict(await call.trailing_metadata())
    status = rpc_status.status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [v.field for v in bad.field_violations] == ["sampling.top_p"]
