"""Who may call what. One interceptor checks the key of every call before the handler runs."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from granatum.router.services.keys import Keys
from granatum.router.services.turns import Turns
from granatum.service.cluster_key import check_cluster_key
from granatum.v1 import adapters_pb2, cluster_pb2, inference_pb2
from granatum.v1.errors import GranatumError, PermissionDenied, Unauthenticated
from granatum.v1.transport import bearer_of

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
REGISTRY = cluster_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name
SERVICES = (INFERENCE, ADAPTERS, CLUSTER, REGISTRY)

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_OPEN = (_HEALTH, reflection.SERVICE_NAME)

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

_tenant: ContextVar[str] = ContextVar("tenant")
_max_priority: ContextVar[int] = ContextVar("max_priority")


def current_tenant() -> str:
    """The tenant of the call that runs in this task."""
    return _tenant.get()


def current_max_priority() -> int:
    """The highest priority that the key of this task's call allows."""
    return _max_priority.get()


class Access(grpc.aio.ServerInterceptor):
    """Tenant keys open Inference and Adapters, admin keys Cluster, the cluster key Registry.

    Health and reflection are open to all. Everything else is refused.
    """

    def __init__(self, keys: Keys, cluster_key: str) -> None:
        self._keys = keys
        self._cluster_key = cluster_key
        self._turns = Turns()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Check the call's key. Raises Unauthenticated or PermissionDenied."""
        method = handler_call_details.method
        service = method.strip("/").partition("/")[0]
        trusted, tenant = False, None
        if service not in _OPEN:
            key = bearer_of(handler_call_details.invocation_metadata)
            if key is None:
                raise Unauthenticated("give a key in the metadata: authorization: Bearer KEY")
            tenant = self._admit(service, key)
            trusted = tenant is None
        handler = await continuation(handler_call_details)
        return handler if handler is None or trusted else self._turns.wrap(handler, method, tenant)

    def _admit(self, service: str, key: str) -> str | None:
        """The tenant that calls; None for runners and operators."""
        if service == REGISTRY:
            check_cluster_key(key, self._cluster_key)
            return None
        identity = self._keys.identify(key)
        if identity is None:
            raise Unauthenticated("the key is unknown or was revoked: ask for a new one")
        if service == CLUSTER and identity.tenant is None:
            return None
        if service in (INFERENCE, ADAPTERS) and identity.tenant is not None:
            _tenant.set(identity.tenant)
            _max_priority.set(identity.max_priority)
            return identity.tenant
        raise _forbidden(service)


def _forbidden(service: str) -> GranatumError:
    if service == CLUSTER:
        return PermissionDenied("this takes an admin key: a tenant's key does not open it")
    if service in (INFERENCE, ADAPTERS):
        return PermissionDenied("this takes a tenant's key: an admin key names no tenant")
    return PermissionDenied(f"{service} is not served here")
