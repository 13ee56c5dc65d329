"""The async client of granatum: `Client` and the records that it takes and gives."""

from granatum.client.client import Client, Generation
from granatum.client.records import Adapter, Completion, End, RunnerStatus, Start, Token, Upload
from granatum.client.requests import Message, Options

__all__ = [
    "Adapter",
    "Client",
    "Completion",
    "End",
    "Generation",
    "Message",
    "Options",
    "RunnerStatus",
    "Start",
    "Token",
    "Upload",
]
