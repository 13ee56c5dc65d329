"""Uploads of a small adapter, and generations with it, over the wire."""

import hashlib
import json
import struct
from collections.abc import Iterator

import grpc
import pytest
from router_box import Box

from granatum.v1 import adapters_pb2 as pb
from granatum.v1.errors import GranatumError
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer


def adapter_files(seed: int = 1, rank: int = 2) -> dict[str, bytes]:
    """A small adapter of the box's model, in PEFT's format, written by hand."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{prefix}.lora_A.weight": (rank, 32), f"{prefix}.lora_B.weight": (32, rank)}
    header, data = {}, b""
    for name, shape in shapes.items():
        values = struct.pack(f"<{shape[0] * shape[1]}f", *[seed / 100] * (shape[0] * shape[1]))
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values
    head = json.dumps(header).encode()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": struct.pack("<Q", len(head)) + head + data,
    }


def upload_requests(
    name: str, files: dict[str, bytes], chunk: int = 100, proof: pb.Proof | None = None
) -> Iterator[pb.UploadAdapterRequest]:
    declarations = [
        pb.FileDeclaration(name=file, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    yield pb.UploadAdapterRequest(
        header=pb.UploadHeader(name=name, files=declarations, proof=proof)
    )
    stream = b"".join(files.values())
    for i in range(0, len(stream), chunk):
        yield pb.UploadAdapterRequest(chunk=stream[i : i + chunk])


async def upload(
    box: Box, key: str, name: str, seed: int = 1, chunk: int = 100
) -> pb.UploadAdapterResponse:
    requests = upload_requests(name, adapter_files(seed), chunk)
    return await box.adapters().UploadAdapter(requests, metadata=bearer(key), timeout=10)


async def generated(box: Box, key: str, adapter: str) -> str:
    """The adapter's full name that a stream was started with."""
    request = GenerateRequest(prompt="x", adapter=adapter, stop=StopConditions(max_tokens=2))
    call = box.inference().Generate(request, metadata=bearer(key), timeout=10)
    responses = [response async for response in call]
    return responses[0].start.adapter


async def error_of(awaitable: object) -> GranatumError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable  # type: ignore[misc]
    return from_rpc_error(caught.value)
