"""Requests to generate: a right one, with some fields made wrong."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hypothesis import strategies as st
from wire_inputs import INF, NAN, Input

from granatum.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest

VOCABULARY = 259
"""Of the tiny base model."""
MANY = 1 << 20

Change = Callable[[GenerateRequest], None]


def _set(path: str, value: Any) -> Change:
    def change(request: GenerateRequest) -> None:
        *parents, name = path.split(".")
        target: Any = request
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, list):
            del getattr(target, name)[:]
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)

    return change


def _chat(messages: list[tuple[str, str]]) -> Change:
    def change(request: GenerateRequest) -> None:
        request.chat.Clear()
        for role, content in messages:
            request.chat.messages.add(role=role, content=content)
        request.chat.SetInParent()

    return change


def _chat_with(**fields: Any) -> Change:
    def change(request: GenerateRequest) -> None:
        request.chat.CopyFrom(Chat(messages=[ChatMessage(role="user", content="x")], **fields))

    return change


def _cleared(request: GenerateRequest) -> None:
    request.ClearField("prompt")


WRONG: tuple[tuple[str, Change], ...] = (
    *(
        (f"sampling.{name}", _set(f"sampling.{name}", value))
        for name, values in {
            "temperature": (-1.0, 1e-39, 1e-30, -0.001, 101.0, 3e38, NAN, INF, -INF),
            "top_p": (0.0, -1.0, 1.5, NAN, INF),
            "min_p": (-0.5, 1.5, NAN, INF),
            "repetition_penalty": (0.0, -1.0, 1e-40, 1e-6, 1e30, NAN, INF),
            "presence_penalty": (-3.0, 3.0, 1e38, NAN, INF),
            "frequency_penalty": (-3.0, 3.0, 1e38, NAN, -INF),
            "top_k": (2**31, 2**32 - 1),
        }.items()
        for value in values
    ),
    ("stop.max_tokens", _set("stop.max_tokens", 0)),
    ("stop.max_tokens", _set("stop.max_tokens", 2**32 - 1)),
    ("stop.min_tokens", _set("stop.min_tokens", 2**32 - 1)),
    ("stop.min_tokens", _set("stop.min_tokens", 1_000)),
    ("stop.token_ids", _set("stop.token_ids", [4_000_000_000])),
    ("stop.token_ids", _set("stop.token_ids", [0, VOCABULARY])),
    ("stop.token_ids", _set("stop.token_ids", list(range(100)))),
    ("stop.strings", _set("stop.strings", ["x"] * 1000)),
    ("stop.strings", _set("stop.strings", ["x", ""])),
    ("stop.strings", _set("stop.strings", ["x" * 100_000])),
    ("logprobs.top", _set("logprobs.top", 21)),
    ("logprobs.top", _set("logprobs.top", 2**32 - 1)),
    ("priority", _set("priority", 2**31 - 1)),
    ("priority", _set("priority", -(2**31))),
    ("priority", _set("priority", 1)),
    ("request_id", _set("request_id", "x" * 10_000)),
    ("request_id", _set("request_id", "a b")),
    ("request_id", _set("request_id", "\0")),
    ("adapter", _set("adapter", "x" * 100_000)),
    *(("adapter", _set("adapter", text)) for text in ("../x", "A", "x@0", "sha256:zz", "x y")),
    ("prompt", _cleared),
    ("prompt", _set("prompt", "")),
    ("prompt", _set("prompt", "a" * 300)),
    ("prompt", _set("prompt", "ab " * 1_300_000)),
    ("prompt", _set("prompt", "é" * 2_500_000)),
    ("token_ids", _set("token_ids.ids", [])),
    ("token_ids", _set("token_ids.ids", [VOCABULARY])),
    ("token_ids", _set("token_ids.ids", [1, 2**32 - 1])),
    ("token_ids", _set("token_ids.ids", [1] * MANY)),
    ("token_ids", _set("token_ids.ids", [1] * (MANY + 1))),
    ("chat", _chat([])),
    ("chat", _chat([("", "x")])),
    ("chat", _chat([("r" * 1000, "x")])),
    ("chat", _chat([("user", "x")] * 5000)),
    ("chat", _chat([("user", "x" * 3_000_000)])),
    *(
        ("chat", _chat_with(**{field: text}))
        for field in ("template_arguments", "tools", "documents")
        for text in ("{", "1", '{"a": NaN}', "[" * 100_000, '{"messages": 1}', '"\\ud800"')
    ),
    ("chat", _chat_with(template_arguments='{"raise_exception": 1, "__class__": 2}')),
    ("chat", _chat_with(tools="[" + "{}," * 300_000 + "{}]")),
    ("chat", _chat_with(continue_final_message=True, add_generation_prompt=True)),
)
"""A field (or where it begins) and a change that makes it wrong for the tiny model, whose context
is 256 tokens, and for a tenant's key without privileges."""


def _right() -> st.SearchStrategy[Change]:
    numbers = {
        "sampling.temperature": st.sampled_from((0.0, 0.001, 1.0, 100.0)),
        "sampling.top_p": st.floats(2**-10, 1, width=32),
        "sampling.min_p": st.floats(0, 1, width=32),
        "sampling.repetition_penalty": st.sampled_from((0.01, 1.0, 100.0)),
        "sampling.presence_penalty": st.floats(-2, 2, width=32),
        "sampling.frequency_penalty": st.floats(-2, 2, width=32),
        "sampling.top_k": st.sampled_from((0, 1, 7, VOCABULARY, 2**31 - 1)),
        "sampling.seed": st.sampled_from((0, 1, 2**64 - 1)),
        "stop.min_tokens": st.integers(0, 3),
        "stop.ignore_eos": st.booleans(),
        "stop.token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=64),
        "stop.strings": st.lists(st.text("abc\n👩é", min_size=1, max_size=9), max_size=16),
        "logprobs.top": st.integers(0, 20),
        "priority": st.sampled_from((0, -1, -1000)),
        "prompt": st.sampled_from(("granite>", "x", "\n", "\0", "<pad> hi", "é👩", "\U0010ffff")),
        "token_ids.ids": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=250),
    }
    return st.one_of(*(values.map(partial(_set, path)) for path, values in numbers.items()))


def generations() -> st.SearchStrategy[Input]:
    """Generate, with any number of fields changed rightly and often one or two wrongly."""

    def build(right: list[Change], wrong: list[tuple[str, Change]], tokens: int) -> Input:
        request = GenerateRequest(prompt="granite>")
        request.stop.max_tokens = tokens
        for change in right:
            change(request)
        for _, change in wrong:
            change(request)
        return Input(
            "InferenceService/Generate",
            (request.SerializeToString(),),
            frozenset(_wrong_fields(request, [field for field, _ in wrong])),
        )

    return st.builds(
        build,
        st.lists(_right(), max_size=5),
        st.lists(st.sampled_from(WRONG), max_size=2),
        st.integers(4, 12),
    )


def with_uploads() -> st.SearchStrategy[Input]:
    """Generate with what the uploads left behind, whatever that may be."""

    def build(right: list[Change]) -> Input:
        request = GenerateRequest(prompt="granite>", adapter="hostile")
        request.stop.max_tokens = 6
        for change in right:
            change(request)
        return Input("InferenceService/Generate", (request.SerializeToString(),), None)

    return st.builds(build, st.lists(st.one_of(_right(), st.sampled_from(_CHATS)), max_size=3))


_CALL = '[{"function": {"name": "f", "arguments": {"a": [1, 1.0, null]}}}]'
_CHATS: tuple[Change, ...] = (
    _chat([("user", "granite")]),
    _chat([("user", "x"), ("assistant", "")] * 100),
    _chat([("user", "é" * 1_000_000)]),
    _chat_with(template_arguments='{"enable_thinking": false, "cls": {"a": 1}}', tools=_CALL),
    _chat_with(documents="[{}]", add_generation_prompt=False),
    _chat_with(continue_final_message=True),
)
"""Right ones, for templates that adapters brought."""


_INPUTS = {"prompt": "prompt", "token_ids": "token_ids", "chat": "chat"}


def _wrong_fields(request: GenerateRequest, changed: list[str]) -> Iterator[str]:
    """Of the fields that were made wrong, those that no later change has overwritten."""
    final = request.WhichOneof("input")
    for field in changed:
        root = field.partition(".")[0]
        if root not in _INPUTS or root == (final or "prompt"):
            yield field
