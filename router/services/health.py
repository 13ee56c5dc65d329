"""What this router says of itself in the standard health service."""

import asyncio

import structlog
from grpc_health.v1.health import OVERALL_HEALTH

from granatum.router.placement.registry import Registry
from granatum.router.services.access import CLUSTER, INFERENCE, REGISTRY, SERVICES
from granatum.service.health import HealthBoard
from granatum.v1.errors import Unavailable

_CHECK_S = 1.0
_NEED_REGISTRY = (INFERENCE, CLUSTER, REGISTRY)

log = structlog.get_logger(__name__)


class RegistryHealth:
    """The process serves until it stops.

    A service that needs the registry serves while the registry answers.

    Streams outlast an absence of the registry. So a liveness probe of the whole process does not
    end them, while a readiness probe of a service sends new requests elsewhere.
    """

    def __init__(self, registry: Registry) -> None:
        self.servicer = HealthBoard()
        self._registry = registry
        self._serving = True

    async def start(self) -> None:
        """Ask the registry for the first time, before anybody asks for the health."""
        self.servicer.set((OVERALL_HEALTH, *SERVICES), serving=True)
        await self._check()

    async def run(self) -> None:
        """Watch the registry until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await self._check()

    def stop(self) -> None:
        """Say for good that nothing is served any more."""
        self.servicer.close()

    async def _check(self) -> None:
        serving = await self._registry_answers()
        if serving != self._serving:
            log.warning("registry answers again" if serving else "registry is away")
            self.servicer.set(_NEED_REGISTRY, serving=serving)
        self._serving = serving

    async def _registry_answers(self) -> bool:
        try:
            await self._registry.ping()
        except Unavailable:
            return False
        return True
