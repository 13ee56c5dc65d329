"""What adapters bring for chats, fetched from the object store and remembered."""

import asyncio
from collections import OrderedDict

from granatum.adapters_store.blobs.blobs import Blobs
from granatum.adapters_store.chat import ChatSettings
from granatum.v1.errors import GranatumError, Unavailable

_FETCH_S = 10.0
_REMEMBERED = 256
"""Each of at most MAX_CHAT_BYTES, so 64 MiB in all."""


class ChatAway(Exception):
    """An adapter's chat settings cannot be fetched here; another runner may fetch them."""

    def __init__(self, cause: GranatumError) -> None:
        super().__init__(cause.message)
        self.cause = cause


class AdapterChats:
    """Fetches chat settings by their SHA-256. Adapters with equal settings share them."""

    def __init__(self, blobs: Blobs, fetch_s: float = _FETCH_S) -> None:
        self._blobs = blobs
        self._fetch_s = fetch_s
        self._known: OrderedDict[str, ChatSettings] = OrderedDict()

    async def get(self, adapter: str, sha256: str) -> ChatSettings:
        """The settings of the adapter `sha256:...`; `sha256` is that of its `chat.json`.

        Raises ChatAway if the store does not bring them in time.
        """
        if sha256 not in self._known:
            self._known[sha256] = await self._fetched(adapter.removeprefix("sha256:"), sha256)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(sha256)
        return self._known[sha256]

    async def _fetched(self, digest: str, sha256: str) -> ChatSettings:
        try:
            async with asyncio.timeout(self._fetch_s):
                return ChatSettings.parse(await self._blobs.read_chat(digest, sha256))
        except GranatumError as error:
            raise ChatAway(error) from error
        except TimeoutError as error:
            late = Unavailable(
                f"the object store did not bring {digest}'s chat template in {self._fetch_s:g} s: "
                "try again",
                reason="ADAPTER_LOAD_STALLED",
                retry_after_s=self._fetch_s,
            )
            raise ChatAway(late) from error
