"""The typed asyncio client of granatum's public services.

    async with Client("127.0.0.1:7070", key="...") as client:
        async for token in client.generate("Once", adapter="storyteller", max_tokens=64):
            print(token.text, end="")

Every call raises the classes of `granatum.v1.errors`. `timeout` is a deadline in seconds that
travels with each call. So the service gives up when the caller does.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from granatum.client.fields import filled, seconds
from granatum.client.proofs import read_proof
from granatum.client.records import (
    Adapter,
    Completion,
    End,
    ProofResult,
    RunnerStatus,
    Start,
    Token,
    Upload,
    Verification,
)
from granatum.client.requests import Options, Prompt, generate_request
from granatum.client.uploads import declare, send
from granatum.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from granatum.v1.errors import Internal
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import Tls, bearer, open_channel

_PAGE_SIZE = 500
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Generation:
    """A stream of tokens; iterate it once. Leaving the loop cancels the request.

    `start` is set from the first message on, `end` after the last token.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[
            inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
        ],
    ) -> None:
        self._call = call
        self.start: Start | None = None
        self.end: End | None = None

    async def __aiter__(self) -> AsyncIterator[Token]:
        try:
            with _errors_translated():
                async for response in self._call:
                    self._note(response)
                    for token in response.tokens:
                        yield Token.of(token)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request now. After its end this does nothing."""
        self._call.cancel()

    def _note(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("start"):
            self.start = Start.of(response.start)
        if response.HasField("end"):
            self.end = End.of(response.end)


class Client:
    """A connection to a router, for one key; use it in `async with`."""

    def __init__(
        self,
        address: str,
        *,
        key: str = "",
        tls: Tls | None = None,
        insecure: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._channel = open_channel(address, tls, insecure=insecure)
        self._metadata = bearer(key) if key else ()
        self._timeout = seconds(timeout)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Continue a prompt; iterate the result for its tokens."""
        request = generate_request(prompt, options)
        timeout = seconds(options.get("timeout"))
        if timeout is None:
            timeout = self._timeout
        return Generation(
            self._inference.Generate(request, timeout=timeout, metadata=self._metadata)
        )

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a prompt to its end."""
        generation = self.generate(prompt, **options)
        tokens = tuple([token async for token in generation])
        if generation.start is None or generation.end is None:
            raise Internal("the stream ended without its start or end: try again")
        return Completion(tokens, generation.start, generation.end)

    async def upload(
        self,
        name: str,
        directory: Path | str,
        *,
        for_base: str = "",
        proof: Path | str | None = None,
    ) -> Upload:
        """Store the PEFT adapter in `directory` as the next version of `name`.

        If the adapter's base model clearly has another name than the served one, the upload is
        refused, unless `for_base` repeats the adapter's own name for its base model. With the file
        `proof`, the adapter is refused (PROOF_FAILED) unless the fleet computes what the file says.
        """
        header, chat = await declare(name, Path(directory), for_base)
        if proof is not None:
            header.proof.CopyFrom(await asyncio.to_thread(read_proof, Path(proof)))
        with _errors_translated():
            response = await self._adapters.UploadAdapter(
                send(header, Path(directory), chat),
                timeout=self._timeout,
                metadata=self._metadata,
            )
        return Upload(Adapter.of(response.adapter), response.created)

    async def verify(self, adapter: str, proof: Path | str) -> Verification:
        """Have the fleet compute what the file `proof` says of an adapter."""
        given = await asyncio.to_thread(read_proof, Path(proof))
        request = filled(adapters_pb2.VerifyAdapterRequest(proof=given), adapter=adapter)
        response = await self._ask(self._adapters.VerifyAdapter, request)
        return Verification(ProofResult.of(response.result), response.passed, response.reason)

    async def get(self, adapter: str) -> Adapter:
        """Describe the version that `adapter` names."""
        request = filled(adapters_pb2.GetAdapterRequest(), adapter=adapter)
        return Adapter.of((await self._ask(self._adapters.GetAdapter, request)).adapter)

    async def list_adapters(self) -> tuple[Adapter, ...]:
        """Every version of the tenant's own adapters, by name, then version."""
        found: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=_PAGE_SIZE)
        while True:
            page = await self._ask(self._adapters.ListAdapters, request)
            found += map(Adapter.of, page.adapters)
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    async def delete(self, adapter: str) -> int:
        """Delete `name` or `name@version`; return the number of deleted versions."""
        request = filled(adapters_pb2.DeleteAdapterRequest(), adapter=adapter)
        return (await self._ask(self._adapters.DeleteAdapter, request)).versions_deleted

    async def set_alias(self, alias: str, adapter: str) -> Adapter:
        """Point `alias` at a version, atomically."""
        request = filled(adapters_pb2.SetAliasRequest(), alias=alias, adapter=adapter)
        return Adapter.of((await self._ask(self._adapters.SetAlias, request)).adapter)

    async def delete_alias(self, alias: str) -> None:
        """Remove an alias."""
        request = filled(adapters_pb2.DeleteAliasRequest(), alias=alias)
        await self._ask(self._adapters.DeleteAlias, request)

    async def publish(self, name: str) -> None:
        """Let every tenant use an adapter, as `tenant/name`."""
        await self._set_visibility(name, adapters_pb2.VISIBILITY_PUBLISHED)

    async def unpublish(self, name: str) -> None:
        """Make a published adapter private again."""
        await self._set_visibility(name, adapters_pb2.VISIBILITY_PRIVATE)

    async def runners(self) -> tuple[RunnerStatus, ...]:
        """The live runners, by id; needs an admin key."""
        response = await self._ask(self._cluster.ListRunners, cluster_pb2.ListRunnersRequest())
        return tuple(map(RunnerStatus.of, response.runners))

    async def drain(self, runner: str) -> None:
        """Place nothing more on a runner and move its streams; needs an admin key."""
        request = filled(cluster_pb2.DrainRunnerRequest(), runner_id=runner)
        await self._ask(self._cluster.DrainRunner, request)

    async def resume(self, runner: str) -> None:
        """Place on a drained runner again; needs an admin key."""
        request = filled(cluster_pb2.ResumeRunnerRequest(), runner_id=runner)
        await self._ask(self._cluster.ResumeRunner, request)

    async def _set_visibility(
        self, name: str, visibility: adapters_pb2.Visibility.ValueType
    ) -> None:
        request = filled(adapters_pb2.SetVisibilityRequest(visibility=visibility), name=name)
        await self._ask(self._adapters.SetVisibility, request)

    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with _errors_translated():
            return await method(request, timeout=self._timeout, metadata=self._metadata)


@contextmanager
def _errors_translated() -> Iterator[None]:
    """Raise the error that the service raised, in place of gRPC's."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
