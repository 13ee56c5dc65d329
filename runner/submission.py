"""What a router submits, checked and turned into what the engine runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from granatum.runner.records import Ready, Sampling, Submit
from granatum.runner.sequence_text import SequenceText
from granatum.runner.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, SamplingParams, StopConditions
from granatum.v1.runner_pb2 import SubmitSequence

MAX_TOP_LOGPROBS = 20
_DIGEST = "sha256:"
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: v >= 0, "at least 0"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda v: v > 0, "above 0"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What this runner can hold."""

    vocabulary: int
    context: int
    """Tokens of a sequence, prompt and output, that model and pages have room for."""

    @classmethod
    def of(cls, ready: Ready, vocabulary: int) -> "Bounds":
        """The bounds of an engine that is ready."""
        room = ready.figures.total_pages * ready.page_tokens
        return cls(vocabulary, min(ready.max_context, room))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sequence for the engine, and its text for the client."""

    submit: Submit
    text: SequenceText


def prepare(
    sequence_id: int, message: SubmitSequence, tokenizer: Tokenizer, bounds: Bounds
) -> Prepared:
    """Tokenize and check a submission; the engine will call it `sequence_id`.

    Takes time with long texts. Raises InvalidRequest for what cannot be served.
    """
    request = message.request
    prompt = _prompt(request, tokenizer, bounds)
    _check_ids(message.generated, "generated", bounds)
    stop = request.stop
    room = bounds.context - len(prompt)
    ends = frozenset() if stop.ignore_eos else tokenizer.end_ids
    submit = Submit(
        sequence_id,
        prompt,
        generated=tuple(message.generated),
        adapter=_digest(message.adapter_digest),
        sampling=_sampling(request.sampling),
        max_tokens=min(_max_tokens(stop, room), room),
        min_tokens=stop.min_tokens,
        stop_ids=ends | frozenset(stop.token_ids),
        top_logprobs=_top_logprobs(request),
        priority=request.priority,
    )
    strings = _stop_strings(stop)
    return Prepared(submit, SequenceText(tokenizer, submit, strings, message.text_delivered))


def _prompt(request: GenerateRequest, tokenizer: Tokenizer, bounds: Bounds) -> tuple[int, ...]:
    match request.WhichOneof("input"):
        case "prompt":
            ids = tokenizer.encode(request.prompt)
        case "token_ids":
            ids = list(request.token_ids.ids)
            _check_ids(ids, "token_ids", bounds)
        case "chat":
            messages = [(message.role, message.content) for message in request.chat.messages]
            ids = tokenizer.encode_chat(messages)
        case _:
            raise _wrong("prompt", "there is no input: send a prompt, token_ids or a chat")
    if not ids:
        raise _wrong("prompt", "the prompt has no tokens: send some text")
    if len(ids) >= bounds.context:
        raise _wrong(
            "prompt",
            f"the prompt has {len(ids)} tokens and this runner holds {bounds.context} with the "
            f"output: send at most {bounds.context - 1}",
        )
    return tuple(ids)


def _check_ids(ids: Sequence[int], field: str, bounds: Bounds) -> None:
    if ids and max(ids) >= bounds.vocabulary:
        wrong = next(token for token in ids if token >= bounds.vocabulary)
        raise _wrong(
            field, f"token id {wrong} is not below the model's vocabulary size {bounds.vocabulary}"
        )


def _digest(text: str) -> str | None:
    if not text:
        return None
    digest = text.removeprefix(_DIGEST)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _wrong("adapter_digest", "an adapter's digest is sha256: and 64 hexadecimal digits")
    return digest


def _sampling(params: SamplingParams) -> Sampling:
    for name, (holds, range_) in _RANGES.items():
        value: float = getattr(params, name)
        given = params.HasField(name)  # type: ignore[arg-type]
        if given and not (math.isfinite(value) and holds(value)):
            raise _wrong(f"sampling.{name}", f"{value:g} is not {range_}")
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=(
            params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
    )


def _max_tokens(stop: StopConditions, room: int) -> int:
    if not stop.HasField("max_tokens"):
        return room
    if stop.max_tokens < 1:
        raise _wrong("stop.max_tokens", "ask for at least 1 token, or leave it out")
    if stop.min_tokens > stop.max_tokens:
        raise _wrong(
            "stop.min_tokens", f"{stop.min_tokens} is above stop.max_tokens, {stop.max_tokens}"
        )
    return stop.max_tokens


def _stop_strings(stop: StopConditions) -> list[str]:
    if "" in stop.strings:
        raise _wrong("stop.strings", "an empty string would stop at once: leave it out")
    return list(stop.strings)


def _top_logprobs(request: GenerateRequest) -> int | None:
    if not request.HasField("logprobs"):
        return None
    if request.logprobs.top > MAX_TOP_LOGPROBS:
        raise _wrong("logprobs.top", f"{request.logprobs.top} is above {MAX_TOP_LOGPROBS}")
    return request.logprobs.top


def _wrong(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", field=field)
