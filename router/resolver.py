"""Which adapter a request means; while the store is away, what it meant last."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

import structlog

from granatum.adapters_store.store import AdapterStore
from granatum.router.deadline import Deadline
from granatum.v1.errors import NotFound, Unavailable

_KNOWN = 20_000
_FRESH_S = 2.0
"""How long the store may take when an older answer would do."""
_AWAY_S = 5.0
"""How long to leave a store in peace that did not answer, when an older answer will do."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter's version: `sha256:...` and `tenant/name@version`; both empty: the base model."""

    digest: str = ""
    name: str = ""


class Resolver:
    """Asks the store each time, so that versions, aliases and deletions count at once."""

    def __init__(self, store: AdapterStore, patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._known: OrderedDict[tuple[str, str], Resolved] = OrderedDict()
        self._away_until = 0.0

    async def resolve(self, tenant: str, reference: str, deadline: Deadline) -> Resolved:
        """The version that `reference` (as in GenerateRequest.adapter) means to this tenant.

        Raises NotFound, InvalidRequest, or Unavailable if the store is away and never told.
        """
        if not reference:
            return Resolved()
        key = (tenant, reference)
        known = self._known.get(key)
        now = asyncio.get_running_loop().time()
        if known is not None and now < self._away_until:
            return known
        give_up = deadline.give_up(self._patience_s)
        try:
            async with asyncio.timeout_at(min(give_up, now + _FRESH_S) if known else give_up):
                resolved = await self._ask(tenant, reference)
        except NotFound:
            self._known.pop(key, None)
            raise
        except (Unavailable, TimeoutError) as error:
            return self._fall_back(known, error)
        self._remember(key, resolved)
        return resolved

    async def _ask(self, tenant: str, reference: str) -> Resolved:
        found = await self._store.resolve(tenant, reference)
        return Resolved(f"sha256:{found.digest}", found.full_name)

    def _fall_back(self, known: Resolved | None, error: Exception) -> Resolved:
        if known is None:
            if isinstance(error, Unavailable):
                raise error
            raise Unavailable(
                "the adapter store did not answer in time: try again",
                reason="STORE_AWAY",
                retry_after_s=_AWAY_S,
            ) from error
        log.warning("adapter store is away, an older answer serves", adapter=known.name)
        self._away_until = asyncio.get_running_loop().time() + _AWAY_S
        return known

    def _remember(self, key: tuple[str, str], resolved: Resolved) -> None:
        self._known[key] = resolved
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
