"""The service that routers call."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from granatum.runner.front.front import Front
from granatum.runner.front.session import RouterSession
from granatum.service.cluster_key import check_cluster_key
from granatum.v1.runner_pb2 import SessionRequest, SessionResponse
from granatum.v1.runner_pb2_grpc import RunnerServiceServicer
from granatum.v1.transport import bearer_of

_FLUSH_S = 1.0
"""The time that a neglected session has for its last messages."""

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class RunnerServicer(RunnerServiceServicer):
    """RunnerService over a front. Every call needs the cluster key."""

    def __init__(self, front: Front, cluster_key: str) -> None:
        self._front = front
        self._key = cluster_key

    async def Session(  # noqa: N802 - named by the service
        self, request_iterator: AsyncIterator[SessionRequest], context: Context
    ) -> AsyncIterator[SessionResponse]:
        """One router's session."""
        check_cluster_key(bearer_of(context.invocation_metadata()) or "", self._key)
        session = self._front.open()
        commands = asyncio.create_task(session.follow(request_iterator))
        guard = asyncio.create_task(_guard(self._front, session, asyncio.current_task()))
        try:
            async for response in session.responses():
                yield response
        finally:
            self._front.close(session)
            commands.cancel()
            guard.cancel()
            await asyncio.gather(commands, guard, session.ended(), return_exceptions=True)


async def _guard(front: Front, session: RouterSession, call: "asyncio.Task[Any] | None") -> None:
    """End the session of a router that neither speaks nor reads.

    The call ends with its session. A call that is writing a message which the router does not read
    would never end, so it is cut.
    """
    log.warning("session ended", why=await session.neglected())
    front.close(session)
    await asyncio.sleep(_FLUSH_S)
    assert call is not None
    call.cancel()
