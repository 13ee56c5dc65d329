"""The async client of granatum: `Client` and the records that it takes and gives."""

from granatum.client.client import Client, Generation
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
from granatum.client.requests import Message, Options

__all__ = [
    "Adapter",
    "Client",
    "Completion",
    "End",
    "Generation",
    "Message",
    "Options",
    "ProofResult",
    "RunnerStatus",
    "Start",
    "Token",
    "Upload",
    "Verification",
]
