"""A whole runner, wired: started, served, and stopped so that no stream is lost."""

import asyncio
import secrets
from contextlib import AsyncExitStack
from typing import Self

import grpc
import structlog

from granatum.adapters_store.blobs.blobs import Blobs
from granatum.adapters_store.objects.location import open_objects
from granatum.models.base_model import BaseModel
from granatum.models.config import read_config
from granatum.runner.engine.child import EngineChild
from granatum.runner.front.adapter_chats import AdapterChats
from granatum.runner.front.engine_keeper import EngineKeeper
from granatum.runner.front.front import Front
from granatum.runner.front.health import SERVICE, EngineHealth
from granatum.runner.front.heartbeat import Heartbeat
from granatum.runner.front.servicer import RunnerServicer
from granatum.runner.settings import RunnerSettings
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.server import build_server, listen
from granatum.service.tasks import cancelled
from granatum.v1.cluster_pb2 import Runner
from granatum.v1.runner_pb2_grpc import add_RunnerServiceServicer_to_server
from granatum.v1.transport import open_channel

_FLUSH_S = 1.0
"""The time for the last messages of sessions that end."""
_ENGINE_S = 5.0
"""The time for the engine's process to end by itself."""

log = structlog.get_logger(__name__)


class RunnerApp:
    """Listens from `async with` on, and serves once the engine `child` is ready.

    At the end of the `async with` the runner goes out of the routers' sight, gives its streams back
    to them, and ends the engine.
    """

    def __init__(self, settings: RunnerSettings, child: EngineChild) -> None:
        self._settings = settings
        self._child = child
        self._key = settings.cluster_key.get_secret_value()
        self._base = BaseModel.from_config(settings.model)
        self._vocabulary = read_config(settings.model).vocab
        self._instance = secrets.token_hex(8)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        tokenizer = Tokenizer(self._settings.model)
        chats = AdapterChats(Blobs(open_objects(self._settings.store)))
        self._front = Front(await self._child.connect(), tokenizer, self._vocabulary, chats)
        self._keeper = EngineKeeper(self._front, self._child, lambda: EngineChild(self._settings))
        self._health = EngineHealth(lambda: self._front.serving)
        self._server = self._build_server()
        port = self._listen()
        self._heartbeat = Heartbeat(
            [await self._stack.enter_async_context(channel) for channel in self._routers()],
            self._key,
            self._figures,
            self._front.set_draining,
        )
        await self._server.start()
        log.info("listening", address=self._address, port=port, runner=self._id)
        self._engines = asyncio.create_task(self._keeper.run(), name="engines")
        self._checks = asyncio.create_task(self._health.run(), name="health")
        self._reports = asyncio.create_task(self._report(), name="heartbeat")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Go out of the routers' sight first, then give streams back, then end the engine."""
        log.info("stopping", grace_s=self._settings.grace_s)
        await cancelled(self._checks, self._reports)
        self._health.stop()
        await self._heartbeat.deregister()
        if not self._engines.done():
            await self._front.drain(self._settings.grace_s)
        self._front.stop()
        await cancelled(self._engines)
        await self._server.stop(_FLUSH_S)
        end = await self._keeper.ended(_ENGINE_S)
        await self._stack.aclose()
        log.info("stopped", engine_status=end.status)

    @property
    def parts(self) -> tuple[asyncio.Task[None], ...]:
        """What runs until the runner is left; a part that ends has failed."""
        return self._engines, self._checks, self._reports

    async def _report(self) -> None:
        await self._front.loaded.wait()
        log.info("serving", runner=self._id)
        await self._heartbeat.run()

    def _build_server(self) -> grpc.aio.Server:
        server = build_server([SERVICE])
        add_RunnerServiceServicer_to_server(RunnerServicer(self._front, self._key), server)
        self._health.add_to(server)
        return server

    def _listen(self) -> int:
        settings = self._settings
        port = listen(self._server, settings.listen, settings.tls, insecure=settings.insecure)
        self._address = settings.address(port)
        self._id = settings.runner_id or self._address
        return port

    def _routers(self) -> list[grpc.aio.Channel]:
        settings = self._settings
        return [
            open_channel(address, settings.router_tls, insecure=settings.insecure)
            for address in settings.router
        ]

    def _figures(self) -> Runner | None:
        """The runner's figures for its heartbeats; None while no engine computes."""
        front = self._front
        if not front.serving:
            return None
        ready, figures = front.ready, front.figures
        return Runner(
            id=self._id,
            address=self._address,
            model=self._base.name,
            model_fingerprint=self._base.fingerprint,
            max_batch=ready.max_batch,
            total_pages=figures.total_pages,
            free_pages=figures.free_pages,
            reclaimable_pages=figures.reclaimable_pages,
            page_tokens=ready.page_tokens,
            sequences=figures.sequences,
            resident_adapters=front.resident,
            decode_steps=figures.decode_steps,
            decode_sequences=figures.decode_sequences,
            decode_adapters=figures.decode_adapters,
            adapter_loads=figures.adapter_loads,
            draining=front.draining,
            max_context=front.bounds.context,
            max_rank=ready.max_rank,
            max_adapter_elements=ready.max_adapter_elements,
            instance=self._instance,
            trouble=figures.load_trouble,
        )
