"""Which adapter a request means. While the store is away, its last answers serve for a moment."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

import structlog

from granatum.adapters_store.store import AdapterStore
from granatum.router.streams.deadline import Deadline
from granatum.v1.errors import RETRY_AFTER_S, DeadlineExceeded, GranatumError, Unavailable

_KNOWN = 20_000
_ANSWER_S = 2.0
"""How long the store may take where an older answer could serve."""
_MEMORY_S = 5.0
"""The age up to which an answer of the store serves while the store is away."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter's version: `sha256:...` and `tenant/name@version`; both empty: the base model."""

    digest: str = ""
    name: str = ""
    rank: int = 0
    elements: int = 0
    """0: not known."""
    chat_sha256: str = ""
    """Of its chat settings, 64 hexadecimal digits; empty: it has none."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An answer of the store, and when the store was asked, on the event loop's clock."""

    resolved: Resolved
    told: float


class Resolver:
    """Asks the store each time, so that new versions, aliases and deletions count at once.

    An older answer serves only if the store itself fails, and only if the store gave it to the same
    tenant within the last seconds. So no caller can change another caller's answer.
    """

    def __init__(self, store: AdapterStore, patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    async def resolve(self, tenant: str, reference: str, deadline: Deadline) -> Resolved:
        """The version that `reference` (as in GenerateRequest.adapter) means to this tenant.

        Raises NotFound, InvalidRequest or DeadlineExceeded. Raises Unavailable if the store is away
        and there is no recent answer.
        """
        if not reference:
            return Resolved()
        key = (tenant, reference)
        give_up = deadline.give_up(self._patience_s)
        known = self._remembered(key)
        asked = asyncio.get_running_loop().time()
        until = min(give_up, asked + _ANSWER_S) if known else give_up
        try:
            async with asyncio.timeout_at(until):
                resolved = await self._ask(tenant, reference)
        except Unavailable as away:
            return self._fall_back(key, away)
        except TimeoutError as late:
            if deadline.give_up_at == until:
                raise DeadlineExceeded(
                    "the deadline came before the adapter was found: give a later one"
                ) from late
            return self._fall_back(key, late)
        except GranatumError:
            self._known.pop(key, None)
            raise
        self._remember(key, _Known(resolved, asked))
        return resolved

    def _remembered(self, key: tuple[str, str]) -> Resolved | None:
        """The store's last answer, if it is recent enough to serve."""
        known = self._known.get(key)
        if known is None or asyncio.get_running_loop().time() - known.told > _MEMORY_S:
            return None
        return known.resolved

    async def _ask(self, tenant: str, reference: str) -> Resolved:
        found = await self._store.resolve(tenant, reference)
        return Resolved(
            f"sha256:{found.digest}",
            found.full_name,
            found.max_rank,
            found.elements,
            found.chat_sha256,
        )

    def _fall_back(self, key: tuple[str, str], error: Exception) -> Resolved:
        known = self._remembered(key)
        if known is None:
            if isinstance(error, Unavailable):
                raise error
            raise Unavailable(
                "the adapter store did not answer in time: try again",
                reason="STORE_AWAY",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        log.warning("adapter store is away, an older answer serves", adapter=known.name)
        return known

    def _remember(self, key: tuple[str, str], known: _Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
