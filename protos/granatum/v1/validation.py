"""What a valid request is. Routers check it, and runners check it again, by these same rules.

An error names the wrong field. Limits that only a model knows (vocabulary, context) are arguments.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from granatum.v1.conversation import Conversation
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, SamplingParams, StopConditions

MAX_PROMPT_BYTES = 4 << 20
MAX_PROMPT_TOKENS = 1 << 20
MAX_ADAPTER = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING = 256
MAX_STOP_IDS = 64
MAX_TOP_LOGPROBS = 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
MAX_PRIORITY = 1_000
"""Priorities go from minus this to this."""
MAX_TOKENS = (1 << 31) - 1
_FLOAT32_STEP = 2.0**-23


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `least` to `most`; with `zero` also 0, as a value of special meaning."""

    least: float
    most: float
    zero: bool = False
    above: bool = False
    """Whether `least` itself is excluded."""

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range."""
        if not math.isfinite(value):
            return False
        # The wire's float32 of 0.01 is slightly less than 0.01.
        least = self.least - abs(self.least) * _FLOAT32_STEP
        high_enough = value > least if self.above else value >= least
        return (self.zero and value == 0) or (high_enough and value <= self.most)

    def __str__(self) -> str:
        start = "0, or from " if self.zero else "above " if self.above else "from "
        return f"{start}{self.least:g} to {self.most:g}"


SAMPLING_RANGES = {
    "temperature": Range(1e-3, 100, zero=True),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(1e-2, 100),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}
"""Logits are divided by some of these numbers. The floors keep the quotients finite."""


def check(request: GenerateRequest) -> None:
    """Raise InvalidRequest for the first field that is wrong."""
    _check_request_id(request.request_id)
    _require(
        len(request.adapter) <= MAX_ADAPTER, "adapter", f"give at most {MAX_ADAPTER} characters"
    )
    _check_input(request)
    _check_sampling(request.sampling)
    _check_stop(request.stop)
    _require(
        request.logprobs.top <= MAX_TOP_LOGPROBS, "logprobs.top", f"give 0 to {MAX_TOP_LOGPROBS}"
    )
    _require(
        abs(request.priority) <= MAX_PRIORITY,
        "priority",
        f"give {-MAX_PRIORITY:,} to {MAX_PRIORITY:,}",
    )


def check_ids(ids: Sequence[int], field: str, vocabulary: int) -> None:
    """Raise InvalidRequest unless all ids are below the size of the model's vocabulary."""
    if ids and max(ids) >= vocabulary:
        wrong = next(token for token in ids if token >= vocabulary)
        raise InvalidRequest(
            f"{field}: token id {wrong} is not below the model's vocabulary size {vocabulary}",
            field=field,
        )


def _require(right: bool, field: str, remedy: str) -> None:
    if not right:
        raise InvalidRequest(f"{field}: {remedy}", field=field)


def _check_request_id(request_id: str) -> None:
    _require(
        not request_id or _REQUEST_ID.fullmatch(request_id) is not None,
        "request_id",
        "give 1 to 128 of letters, digits and . _ : / + = @ -, or nothing",
    )


def _check_input(request: GenerateRequest) -> None:
    match request.WhichOneof("input"):
        case "prompt":
            _require(
                1 <= len(request.prompt.encode()) <= MAX_PROMPT_BYTES,
                "prompt",
                f"give 1 to {MAX_PROMPT_BYTES:,} bytes of text",
            )
        case "token_ids":
            number = len(request.token_ids.ids)
            _require(
                1 <= number <= MAX_PROMPT_TOKENS,
                "token_ids.ids",
                f"give 1 to {MAX_PROMPT_TOKENS:,} token ids",
            )
        case "chat":
            Conversation.of(request.chat)
        case _:
            raise InvalidRequest(
                "the request has nothing to continue: set one of prompt, token_ids, chat",
                field="prompt",
            )


def _check_sampling(sampling: SamplingParams) -> None:
    for name, allowed in SAMPLING_RANGES.items():
        value: float = getattr(sampling, name)
        if sampling.HasField(name):  # type: ignore[arg-type]
            right = allowed.holds(value)
            _require(right, f"sampling.{name}", f"{value:g} is not a number {allowed}")
    _require(sampling.top_k < 2**31, "sampling.top_k", "give at most 2,147,483,647; 0 keeps all")


def _check_stop(stop: StopConditions) -> None:
    for name in ("max_tokens", "min_tokens"):
        number: int = getattr(stop, name)
        _require(number <= MAX_TOKENS, f"stop.{name}", f"give at most {MAX_TOKENS:,}")
    if stop.HasField("max_tokens"):
        _require(stop.max_tokens >= 1, "stop.max_tokens", "give at least 1, or leave it out")
        _require(
            stop.min_tokens <= stop.max_tokens,
            "stop.min_tokens",
            f"{stop.min_tokens} is above stop.max_tokens, {stop.max_tokens}",
        )
    _require(
        len(stop.strings) <= MAX_STOP_STRINGS,
        "stop.strings",
        f"give at most {MAX_STOP_STRINGS} strings",
    )
    for i, text in enumerate(stop.strings):
        _require(
            1 <= len(text) <= MAX_STOP_STRING,
            f"stop.strings[{i}]",
            f"give 1 to {MAX_STOP_STRING} characters",
        )
    _require(
        len(stop.token_ids) <= MAX_STOP_IDS, "stop.token_ids", f"give at most {MAX_STOP_IDS} ids"
    )
