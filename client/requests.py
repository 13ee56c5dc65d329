"""A request to generate, from Python values to the wire."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from granatum.v1 import inference_pb2
from granatum.v1.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: `system`, `user` or `assistant`, and what they say."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation for the model's chat template."""


class Options(TypedDict, total=False):
    """The options of a request. The service has a default for each that is left out."""

    adapter: str
    """`name`, `name@version`, an alias, `sha256:...` or `tenant/name`; absent: the base model."""
    request_id: str
    """It seeds sampling if `seed` is absent. The id of a running request is refused."""
    priority: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    temperature: float
    """0, the default, is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logprobs: int
    """How many alternatives to list beside each chosen token; absent: no log probabilities."""
    timeout: float
    """Seconds; absent: the client's own."""


def generate_request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    """The message of one request.

    Raises TypeError for an option that does not exist, and InvalidRequest for a value that no
    message can carry.
    """
    if unknown := set(options) - Options.__optional_keys__:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    try:
        return _message(prompt, options)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"a text of the request is not Unicode ({error.reason})") from None
    except ValueError as error:  # protobuf's own error names the value, not the field
        raise InvalidRequest(f"a number of the request cannot be sent: {error}") from None


def _message(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        adapter=options.get("adapter", ""),
        request_id=options.get("request_id", ""),
        priority=options.get("priority", 0),
        sampling=_sampling(options),
        stop=_stop(options),
    )
    if "logprobs" in options:
        request.logprobs.CopyFrom(inference_pb2.LogprobOptions(top=options["logprobs"]))
    _set_input(request, prompt)
    return request


def _sampling(options: Options) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty"),
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        seed=options.get("seed"),
    )


def _stop(options: Options) -> inference_pb2.StopConditions:
    return inference_pb2.StopConditions(
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens", 0),
        strings=options.get("stop", ()),
        token_ids=options.get("stop_token_ids", ()),
        ignore_eos=options.get("ignore_eos", False),
    )


def _set_input(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.prompt = prompt
        return
    for part in prompt:
        if isinstance(part, Message):
            request.chat.messages.add(role=part.role, content=part.content)
        else:
            request.token_ids.ids.append(part)
