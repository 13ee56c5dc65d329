"""Inputs for every public RPC, right ones and wrong ones, drawn by Hypothesis.

Each input knows which fields are wrong, if that is certain, by rules that are written here anew:
nothing of the code under test decides what it should refuse. Where nothing is certain (`wrong` is
None), any answer will do that a sane service gives.
"""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hostile_requests import generations, with_uploads
from hostile_uploads import uploads
from hypothesis import strategies as st
from wire_inputs import INF, NAN, ODD_TEXTS, Input

from granatum.v1 import adapters_pb2, cluster_pb2, inference_pb2
from granatum.v1.inference_pb2 import GenerateRequest


def inputs() -> st.SearchStrategy[Input]:
    """Any input of any public RPC."""
    return st.one_of(
        generations(),
        generations(),
        generations(),
        anything(),
        uploads(),
        uploads(),
        with_uploads(),
        garbage(),
    )


_SERVICES = (
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
)
"""The public services. The other ones demand the cluster's key."""
ONE_REQUEST: dict[str, Descriptor] = {
    f"{service.name}/{method.name}": method.input_type
    for service in _SERVICES
    for method in service.methods
    if not method.client_streaming
}
"""The message of every method that takes one."""


def anything() -> st.SearchStrategy[Input]:
    """A random message of a random RPC, built from its proto."""

    def of(method: str) -> st.SearchStrategy[Input]:
        admin = method.startswith("ClusterService")
        return _message(ONE_REQUEST[method]).map(
            lambda m: Input(method, (m.SerializeToString(),), None, as_admin=admin)
        )

    return st.sampled_from(sorted(ONE_REQUEST)).flatmap(of)


def garbage() -> st.SearchStrategy[Input]:
    """Bytes that are no message, or one with text that is no text."""
    methods = [*ONE_REQUEST, "AdapterService/UploadAdapter"]
    surrogate = GenerateRequest(prompt="XX").SerializeToString().replace(b"XX", b"\xed\xa0")
    data = st.one_of(st.binary(max_size=60), st.sampled_from((surrogate, b"\xff" * 9, b"\x0a")))
    return st.builds(
        lambda method, parts: Input(
            method, tuple(parts), None, as_admin=method.startswith("ClusterService")
        ),
        st.sampled_from(methods),
        st.lists(data, min_size=1, max_size=1),
    )


_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, NAN, INF, -INF)


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in _INTEGERS:
        least, most = _INTEGERS[field.type]
        return st.one_of(
            st.sampled_from((least, most, 0, 1, 255, most // 2)), st.integers(least, most)
        )
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return st.sampled_from(_FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from((0, 1, 2, 99, -1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=30)
    names = st.sampled_from(("runner-x", "hostile", "mine", "mine@1", "acme/mine", ""))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return st.one_of(names, st.sampled_from(ODD_TEXTS), text, st.just("x" * 70_000))


def _message(descriptor: Any) -> st.SearchStrategy[Message]:
    from google.protobuf.message_factory import GetMessageClass

    def field_value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
        one = _message(field.message_type) if field.message_type else _value(field)
        return st.lists(one, max_size=4) if field.is_repeated else one

    def fill(values: dict[str, Any]) -> Message:
        message = GetMessageClass(descriptor)()
        for name, value in values.items():
            if isinstance(value, list):
                getattr(message, name).extend(value)
            elif isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    optional = {field.name: field_value(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=optional).map(fill)
