"""Requests that are wrong, each with the field that is named."""

import math
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from router_box import Box

from granatum.router import validation
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    LogprobOptions,
    SamplingParams,
    StopConditions,
    TokenIds,
)
from granatum.v1.transport import bearer


def _sampling(name: str, value: Any) -> SamplingParams:
    return SamplingParams(**{name: value})


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "é" * (validation.MAX_PROMPT_BYTES // 2 + 1)}),
    ("token_ids.ids", {"prompt": None, "token_ids": TokenIds()}),
    ("chat.messages", {"prompt": None, "chat": Chat()}),
    ("chat.messages[0].role", {"prompt": None, "chat": Chat(messages=[ChatMessage(content="x")])}),
    ("request_id", {"request_id": "a b"}),
    ("request_id", {"request_id": "x" * 129}),
    ("request_id", {"request_id": "ü"}),
    ("adapter", {"adapter": "x" * 257}),
    *(
        (f"sampling.{name}", {"sampling": _sampling(name, value)})
        for name, values in {
            "temperature": (-0.1, math.nan, math.inf, 101),
            "top_p": (0, -1, 1.1, math.nan),
            "min_p": (-0.1, 1.1),
            "repetition_penalty": (0, -1, math.inf),
            "presence_penalty": (-2.1, 2.1, math.nan),
            "frequency_penalty": (-2.1, 2.1),
            "top_k": (2**31,),
        }.items()
        for value in values
    ),
    ("stop.max_tokens", {"stop": StopConditions(max_tokens=0)}),
    ("stop.min_tokens", {"stop": StopConditions(max_tokens=3, min_tokens=4)}),
    ("stop.strings", {"stop": StopConditions(strings=["x"] * 17)}),
    ("stop.strings[1]", {"stop": StopConditions(strings=["x", ""])}),
    ("stop.strings[0]", {"stop": StopConditions(strings=["x" * 257])}),
    ("stop.token_ids", {"stop": StopConditions(token_ids=range(65))}),
    ("logprobs.top", {"logprobs": LogprobOptions(top=21)}),
]


@pytest.mark.parametrize(("field", "fields"), BAD)
def test_the_wrong_field_is_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validation.check(GenerateRequest(**({"prompt": "x"} | fields)))
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x"},
        {"token_ids": TokenIds(ids=[0])},
        {"chat": Chat(messages=[ChatMessage(role="user", content="x")])},
        {"prompt": "x", "request_id": "Order-7:2/b.c_d+e=f@g", "priority": -(2**31)},
        {
            "prompt": "x",
            "sampling": SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, seed=2**64 - 1),
            "stop": StopConditions(min_tokens=7, strings=["\n"] * 16, token_ids=range(64)),
            "logprobs": LogprobOptions(top=20),
        },
    ],
)
def test_what_is_right_passes(fields: dict[str, Any]) -> None:
    validation.check(GenerateRequest(**fields))


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
