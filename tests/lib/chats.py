"""Chats, and chat templates of the shapes that models have."""

import json
from typing import Any

from granatum.v1.inference_pb2 import Chat, ChatMessage

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n' }}{%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
        {{- '<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) }}
        {{- message.name ~ message.tool_call_id ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3 = """
{%- for message in messages %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}
        {%- set thought = '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' %}
    {%- endif %}
    {%- if message.tool_calls is defined %}{{- '<calls>' }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + thought + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- for document in documents or [] %}{{- document.title + ': ' + document.text }}{%- endfor %}
{%- if budget is defined %}{{- '<budget ' ~ budget.tokens ~ ' ' ~ budget.share ~ '>' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <today> & tomorrow: größer",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "n": 1}}}
USER: dict[str, Any] = {"role": "user", "content": "How warm is it?"}
SAID: dict[str, Any] = {"role": "assistant", "content": "It is"}
TOOL_TURNS: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 °C", "tool_call_id": "call_1", "name": "weather"},
]

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ("chatml", [USER], {}),
    "no answer begins": ("chatml", [USER, SAID], {"add_generation_prompt": False}),
    "continued": ("chatml", [USER, SAID], {"continue_final_message": True}),
    "continued from a blank": (
        "chatml",
        [USER, {"role": "assistant", "content": "It is "}],
        {"continue_final_message": True},
    ),
    "continued where the template trims": (
        "llama3",
        [USER, {"role": "assistant", "content": " It is  "}],
        {"continue_final_message": True},
    ),
    "continued from nothing": (
        "chatml",
        [USER, {"role": "assistant", "content": ""}],
        {"continue_final_message": True},
    ),
    "continued in Mistral": ("mistral", [USER, SAID], {"continue_final_message": True}),
    "empty": ("chatml", [{"role": "user", "content": ""}], {}),
    "empty system": ("llama3", [{"role": "system", "content": ""}, USER], {}),
    "tools": ("llama3", [USER], {"tools": TOOLS}),
    "no tools": ("llama3", [USER], {"tools": []}),
    "a tool's answer": ("llama3", TOOL_TURNS, {"tools": TOOLS}),
    "no calls": (
        "qwen3",
        [USER, {"role": "assistant", "content": "It is", "tool_calls": []}],
        {},
    ),
    "thinking": ("qwen3", [USER], {"enable_thinking": True}),
    "no thinking": ("qwen3", [USER], {"enable_thinking": False}),
    "numbers and objects": ("qwen3", [USER], {"budget": {"tokens": 100, "share": 1.0}}),
    "reasoning": ("qwen3", [USER, {**SAID, "reasoning_content": "12 or 13"}, USER], {}),
    "documents": ("qwen3", [USER], {"documents": [{"title": "Log", "text": "12 °C"}]}),
    "ignored": ("mistral", [USER], {"enable_thinking": False, "tools": TOOLS}),
}


def chat_of(*messages: tuple[str, str]) -> Chat:
    """A chat of (role, content) messages."""
    return Chat(messages=[ChatMessage(role=role, content=said) for role, said in messages])


def wire(messages: list[dict[str, Any]], options: dict[str, Any]) -> Chat:
    """The chat that a client would send."""
    chat = Chat()
    for message in messages:
        plain = dict(message)
        if "tool_calls" in plain:
            plain["tool_calls"] = json.dumps(plain["tool_calls"])
        chat.messages.append(ChatMessage(**plain))
    own = dict(options)
    for name in ("continue_final_message", "add_generation_prompt"):
        if name in own:
            setattr(chat, name, own.pop(name))
    for name in ("tools", "documents"):
        if name in own:
            setattr(chat, name, json.dumps(own.pop(name)))
    if own:
        chat.template_arguments = json.dumps(own)
    return chat
