"""Chats of roles and what they say."""

from granatum.v1.inference_pb2 import Chat, ChatMessage


def chat_of(*messages: tuple[str, str]) -> Chat:
    """A chat of (role, content) messages."""
    return Chat(messages=[ChatMessage(role=role, content=said) for role, said in messages])
