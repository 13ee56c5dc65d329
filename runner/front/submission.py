"""What a router submits, checked and turned into what the engine runs."""

from dataclasses import dataclass

from granatum.adapters_store.chat import ChatSettings
from granatum.runner.records import Ready, Sampling, Submit
from granatum.runner.text.sequence_text import SequenceText
from granatum.runner.text.tokenizer import Tokenizer, TooManyTokens
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from granatum.v1.runner_pb2 import SubmitSequence
from granatum.v1.validation import MAX_PROMPT_TOKENS, check, check_ids

_DIGEST = "sha256:"
_NO_OWN = ChatSettings()


@dataclass(frozen=True, slots=True)
class SequenceBounds:
    """What a sequence may be on this runner."""

    vocabulary: int
    context: int
    """The most tokens of a sequence, prompt and output, that model and pages have room for."""

    @classmethod
    def of(cls, ready: Ready, vocabulary: int) -> "SequenceBounds":
        """The bounds of an engine that is ready."""
        room = ready.figures.total_pages * ready.page_tokens
        return cls(vocabulary, min(ready.max_context, room))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sequence for the engine, and its text for the client."""

    submit: Submit
    text: SequenceText
    prompt: TokenIds | None
    """The ids that were made of a text here, for the router.

    None: the router has them, or they are more than a request may bring.
    """


def prepare(
    sequence_id: int,
    message: SubmitSequence,
    tokenizer: Tokenizer,
    bounds: SequenceBounds,
    own: ChatSettings = _NO_OWN,
) -> Prepared:
    """Tokenize and check a submission; `sequence_id` is the engine's id for it.

    `own` is what the adapter's folder says of chats. The time grows with the text. Raises
    InvalidRequest if this runner cannot serve it.
    """
    request = message.request
    check(request)
    stop = request.stop
    check_ids(stop.token_ids, "stop.token_ids", bounds.vocabulary)
    prompt = _prompt(request, tokenizer, bounds, own)
    check_ids(message.generated, "generated", bounds.vocabulary)
    room = bounds.context - len(prompt)
    ends: frozenset[int] = frozenset()
    if not stop.ignore_eos:
        ends = tokenizer.ends_within(bounds.vocabulary) | tokenizer.ends_of(own)
    special = [tokenizer.special_tokens.get(text, bounds.vocabulary) for text in stop.strings]
    named = {token for token in special if token < bounds.vocabulary}
    submit = Submit(
        sequence_id,
        prompt,
        generated=tuple(message.generated),
        adapter=_digest(message.adapter_digest),
        sampling=_sampling(request.sampling),
        max_tokens=min(stop.max_tokens, room) if stop.HasField("max_tokens") else room,
        min_tokens=stop.min_tokens,
        stop_ids=ends.union(stop.token_ids, named),
        top_logprobs=request.logprobs.top if request.HasField("logprobs") else None,
        priority=request.priority,
        suspicion=message.suspicion,
        forced=_forced(message, room, bounds.vocabulary),
    )
    text = SequenceText(tokenizer, submit, tuple(stop.strings), message.text_delivered)
    untold = request.WhichOneof("input") != "token_ids" and len(prompt) <= MAX_PROMPT_TOKENS
    return Prepared(submit, text, TokenIds(ids=prompt) if untold else None)


def _prompt(
    request: GenerateRequest, tokenizer: Tokenizer, bounds: SequenceBounds, own: ChatSettings
) -> tuple[int, ...]:
    """The prompt's ids. A prompt that fills the context is refused; not all its ids are made."""
    most = bounds.context - 1
    field = {"token_ids": "token_ids.ids", "chat": "chat.messages"}.get(
        request.WhichOneof("input") or "", "prompt"
    )
    try:
        ids = _ids(request, tokenizer, most, own)
    except TooManyTokens as error:
        raise _wrong(
            field,
            f"the prompt has {error.tokens} tokens and this runner holds {bounds.context} with "
            f"the output: send at most {most}",
        ) from error
    if not ids:
        raise _wrong(field, "the prompt has no tokens: send some text")
    if field == "token_ids.ids":
        check_ids(ids, field, bounds.vocabulary)
    else:
        _check_tokenized(ids, field, bounds.vocabulary)
    return tuple(ids)


def _ids(request: GenerateRequest, tokenizer: Tokenizer, most: int, own: ChatSettings) -> list[int]:
    match request.WhichOneof("input"):
        case "prompt":
            return tokenizer.encode(request.prompt, most)
        case "chat":
            return tokenizer.encode_chat(request.chat, most, own)
        case _:
            number = len(request.token_ids.ids)
            if number > most:
                raise TooManyTokens(str(number))
            return list(request.token_ids.ids)


def _forced(message: SubmitSequence, room: int, vocabulary: int) -> tuple[int, ...]:
    """The given output. It must fit whole: half of its log probabilities would answer nothing."""
    check_ids(message.forced, "forced", vocabulary)
    if len(message.forced) > room:
        raise _wrong(
            "forced",
            f"prompt and output have {len(message.forced) - room} tokens more than this runner "
            "holds: send shorter ones",
        )
    return tuple(message.forced)


def _check_tokenized(ids: list[int], field: str, vocabulary: int) -> None:
    """Refuse ids past the model's last one: a tokenizer may have tokens that the model lacks."""
    if max(ids) >= vocabulary:
        wrong = next(token for token in ids if token >= vocabulary)
        raise _wrong(
            field,
            f"the tokenizer makes token id {wrong} of a part of it, which the model lacks: its "
            f"vocabulary has {vocabulary}; leave out that special token",
        )


def _digest(text: str) -> str | None:
    if not text:
        return None
    digest = text.removeprefix(_DIGEST)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _wrong("adapter_digest", "an adapter's digest is sha256: and 64 hexadecimal digits")
    return digest


def _sampling(params: SamplingParams) -> Sampling:
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


def _wrong(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", field=field)
