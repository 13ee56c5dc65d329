"""Requests that are wrong, each with the field that is named."""

import math
from typing import Any

import pytest

from granatum.v1 import validation
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
            "temperature": (-0.1, math.nan, math.inf, 101, 1e-39, 9e-4),
            "top_p": (0, -1, 1.1, math.nan),
            "min_p": (-0.1, 1.1),
            "repetition_penalty": (0, -1, math.inf, 1e-40, 9e-3),
            "presence_penalty": (-2.1, 2.1, math.nan),
            "frequency_penalty": (-2.1, 2.1),
            "top_k": (2**31,),
        }.items()
        for value in values
    ),
    ("stop.max_tokens", {"stop": StopConditions(max_tokens=0)}),
    ("stop.max_tokens", {"stop": StopConditions(max_tokens=2**31)}),
    ("stop.min_tokens", {"stop": StopConditions(min_tokens=2**32 - 1)}),
    ("priority", {"priority": 1001}),
    ("priority", {"priority": -(2**31)}),
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
        {"prompt": "x", "request_id": "Order-7:2/b.c_d+e=f@g", "priority": -1000},
        {"prompt": "x", "sampling": SamplingParams(temperature=1e-3, repetition_penalty=0.01)},
        {"prompt": "x", "sampling": SamplingParams(presence_penalty=-2, frequency_penalty=2)},
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


def test_ids_are_checked_against_the_vocabulary() -> None:
    validation.check_ids([0, 9], "stop.token_ids", 10)
    with pytest.raises(InvalidRequest, match="token id 10 is not below") as caught:
        validation.check_ids([0, 10], "stop.token_ids", 10)
    assert caught.value.field == "stop.token_ids"
