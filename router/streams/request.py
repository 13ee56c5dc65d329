"""A request to generate, accepted: who asks, for which adapter, and how much it may take."""

import hashlib
from dataclasses import dataclass

from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, TokenIds

_BYTES_PER_TOKEN = 3
"""A low guess for text, which only the runner can tokenize: rather too many tokens are reserved."""


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """A request whose fields were checked and whose adapter was resolved."""

    tenant: str
    request_id: str
    message: GenerateRequest
    named: bool = False
    """Whether the client chose the id. Only ids that clients chose can collide."""
    adapter_digest: str = ""
    """`sha256:...`; empty for the base model."""
    adapter: str = ""
    """`tenant/name@version`; empty for the base model."""
    rank: int = 0
    elements: int = 0
    """Elements of the adapter; 0: not known."""
    forced: tuple[int, ...] = ()
    """Tokens of the output that are given; empty for whatever clients ask."""
    adapter_chat: str = ""
    """SHA-256 of the adapter's chat settings; empty: it has none."""

    @property
    def estimated_tokens(self) -> int:
        """Tokens in the prompt: exact for token ids, a guess from the size for text."""
        match self.message.WhichOneof("input"):
            case "token_ids":
                return len(self.message.token_ids.ids)
            case "prompt":
                size = len(self.message.prompt.encode())
            case _:
                size = self.message.chat.ByteSize()
        return 1 + size // _BYTES_PER_TOKEN

    def fix_prompt(self, prompt: TokenIds) -> None:
        """Put the ids that a runner made of the prompt in the prompt's place.

        The next runner must not render the chat template again: a template that tells the time
        would make another prompt.
        """
        self.message.token_ids.CopyFrom(prompt)


def prepare(message: GenerateRequest, tenant: str, request_id: str) -> None:
    """Make the client's message what runners get: a seed is set, the names are removed.

    The message is changed in place, because a prompt may be large and a router holds many.
    """
    message.ClearField("request_id")
    message.ClearField("adapter")
    if not message.sampling.HasField("seed"):
        message.sampling.seed = _seed(tenant, request_id)


def limit_priority(message: GenerateRequest, max_priority: int) -> None:
    """Raise InvalidRequest if the key does not allow the message's priority.

    A key may allow only negative priorities. Then 0, the default, becomes the key's highest.
    """
    if message.priority > max(max_priority, 0):
        raise InvalidRequest(
            f"priority: {message.priority} is above {max_priority}, the highest of your key: give "
            "a lower one, or ask for another key",
            field="priority",
        )
    message.priority = min(message.priority, max_priority)


def _seed(tenant: str, request_id: str) -> int:
    digest = hashlib.sha256(f"{tenant}/{request_id}".encode()).digest()
    return int.from_bytes(digest[:8])
