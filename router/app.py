"""A whole router: its parts are wired here, and opened, served and closed together."""

import asyncio
import secrets
from typing import Self

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from granatum.adapters_store.store import AdapterStore
from granatum.models.base_model import BaseModel
from granatum.router.collection import Collection
from granatum.router.placement.admission import Admission
from granatum.router.placement.leases import Leases
from granatum.router.placement.registry import Registry
from granatum.router.services.access import SERVICES, Access
from granatum.router.services.adapters import AdapterServicer
from granatum.router.services.calls import Calls
from granatum.router.services.cluster import ClusterServicer, RegistryServicer
from granatum.router.services.health import RegistryHealth
from granatum.router.services.inference import InferenceServicer
from granatum.router.services.keys import Keys
from granatum.router.services.proofs import Proofs
from granatum.router.services.quotas import Quotas
from granatum.router.services.resolver import Resolver
from granatum.router.settings import RouterSettings
from granatum.router.streams.session import RunnerSessions
from granatum.router.streams.stream import Streams
from granatum.service.server import MAX_PUBLIC_BYTES, build_server, listen
from granatum.service.tasks import cancelled, keep_up
from granatum.v1.adapters_pb2_grpc import add_AdapterServiceServicer_to_server
from granatum.v1.cluster_pb2_grpc import (
    add_ClusterServiceServicer_to_server,
    add_RegistryServiceServicer_to_server,
)
from granatum.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from granatum.v1.transport import open_channel

_FAREWELL_S = 0.5
"""After the grace: the time for clients to hear that their streams end here."""

log = structlog.get_logger(__name__)


class RouterApp:
    """Serves inside `async with`. At its end streams have the settings' grace to finish."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._id = secrets.token_hex(8)
        self._cluster_key = settings.cluster_key.get_secret_value()
        self._base_model = BaseModel.from_config(settings.base_config, settings.base_name)
        self._keys = Keys(settings.keys)
        self._store = AdapterStore.open(settings.store, self._base_model, settings.limits)
        self._registry = Registry(settings.redis, self._base_model.fingerprint, settings.terms)
        if (tls := settings.runner_tls) is not None:
            tls.check_channel()
        self._sessions = RunnerSessions(self._connect, self._cluster_key, settings.silence_s)
        self._quotas = Quotas(settings.bounds)
        self._calls = Calls(self._quotas, settings.unread_s)
        self._leases = Leases(self._registry)
        self._admission = Admission(self._registry, self._leases, self._sessions.unreachable)
        self._health = RegistryHealth(self._registry)
        self.port = 0

    async def __aenter__(self) -> Self:
        settings = self._settings
        self._server = self._build()
        self.port = listen(self._server, settings.listen, settings.tls, insecure=settings.insecure)
        if settings.loopback is not None:
            listen(self._server, settings.loopback)
        await self._health.start()
        self.background = asyncio.create_task(self._run_background(), name="background")
        await self._server.start()
        address = f"{settings.listen.rpartition(':')[0]}:{self.port}"
        log.info("listening", address=address, port=self.port, router=self._id)
        return self

    async def __aexit__(self, *_: object) -> None:
        log.info("stopping", grace_s=self._settings.grace_s)
        self._health.stop()
        await self._end_calls()
        await self._sessions.close()
        await cancelled(self.background)
        await self._leases.close()
        await self._registry.close()

    async def _end_calls(self) -> None:
        grace_s = self._settings.grace_s
        stop = asyncio.create_task(self._server.stop(grace_s + _FAREWELL_S))
        await asyncio.wait({stop}, timeout=grace_s)
        self._calls.end_all()
        await stop
        await self._calls.close()

    async def _run_background(self) -> None:
        collection = Collection(
            self._store.collect_garbage, self._registry, self._id, self._settings.collect_s
        )
        async with asyncio.TaskGroup() as tasks:
            for part in (self._leases, self._admission, self._health, collection):
                tasks.create_task(keep_up(part.run, type(part).__name__))

    def _connect(self, address: str) -> grpc.aio.Channel:
        tls = self._settings.runner_tls
        return open_channel(address, tls, insecure=self._settings.insecure)

    def _build(self) -> grpc.aio.Server:
        access = Access(self._keys, self._cluster_key)
        server = build_server(SERVICES, [access], max_bytes=MAX_PUBLIC_BYTES)
        patience = self._settings.patience
        streams = Streams(
            self._id, self._registry, self._leases, self._admission, self._sessions, patience
        )
        resolver = Resolver(self._store, patience.placement_s)
        runners = RegistryServicer(self._registry, self._base_model, self._settings.heartbeat_s)
        inference = InferenceServicer(resolver, streams, self._calls)
        proofs = Proofs(streams, self._quotas)
        adapters = AdapterServicer(self._store, self._registry.runners, proofs)
        add_InferenceServiceServicer_to_server(inference, server)
        add_AdapterServiceServicer_to_server(adapters, server)
        add_ClusterServiceServicer_to_server(ClusterServicer(self._registry), server)
        add_RegistryServiceServicer_to_server(runners, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        return server
