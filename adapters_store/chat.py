"""What an adapter's folder says of chats: its own chat template, and tokens that end an answer.

An upload may bring both in a third file, `chat.json`. A template is a program of a tenant. It is
only parsed here, never run: `runner/text/templates` runs it in a process of its own.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from granatum.v1.errors import InvalidAdapter

CHAT_FILE = "chat.json"
MAX_CHAT_BYTES = 256 << 10
_MAX_END_TOKENS = 16
_MAX_WORDS = 20_000
"""The most words, signs and blanks of a template. A large one, of 20 kB, has some 6,000.

They bound the time of parsing, which slows down a whole router.
"""
_FIELDS = ("chat_template", "end_tokens")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """An adapter's chat template (empty: the base model's), and its end tokens by their text."""

    template: str = ""
    end_tokens: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> "ChatSettings":
        """Read a `chat.json`. Raises InvalidAdapter."""
        try:
            fields = json.loads(data)
            json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise _wrong(f"is no JSON ({error}): write it with a JSON library") from None
        if not isinstance(fields, dict) or not fields.keys() <= set(_FIELDS):
            raise _wrong(f"give a JSON object of {' and '.join(_FIELDS)}")
        template, tokens = fields.get("chat_template", ""), fields.get("end_tokens", [])
        if not isinstance(template, str):
            raise _wrong("chat_template: give text")
        if not isinstance(tokens, list) or not all(isinstance(t, str) and t for t in tokens):
            raise _wrong("end_tokens: give a list of tokens, each by its text")
        if len(tokens) > _MAX_END_TOKENS:
            raise _wrong(f"end_tokens: give at most {_MAX_END_TOKENS}")
        return cls(template, tuple(tokens))


def check_chat(file: Path, model: Path) -> None:
    """Raise InvalidAdapter unless `file`, a `chat.json`, can be served with the model in `model`.

    Blocks.
    """
    settings = ChatSettings.parse(file.read_bytes())
    try:
        known = _tokens(model) if settings.end_tokens else frozenset()
    except (OSError, ValueError, LookupError, TypeError):
        known = frozenset()
    for token in settings.end_tokens:
        if token not in known:
            raise _wrong(
                f"end_tokens: {token[:70]!r} is no token of the base model's tokenizer, and an "
                "adapter cannot add one, since all adapters share the base model's embeddings: "
                "train with an end token that the base model has, or remove this one from the "
                "adapter's tokenizer_config.json (eos_token) or generation_config.json "
                "(eos_token_id)"
            )
    if settings.template:
        _check_syntax(settings.template)


def _check_syntax(template: str) -> None:
    # Parsed, and not compiled: to compile computes what is constant, such as 10 ** 10 ** 10.
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag by which transformers finds what an assistant said."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    try:
        if next(islice(environment.lex(template), _MAX_WORDS, None), None):
            raise _wrong(
                f"chat_template: it has more than {_MAX_WORDS:,} words and signs: simplify it"
            )
        environment.parse(template)
    except TemplateSyntaxError as error:
        raise _wrong(
            f"chat_template: line {error.lineno} is no Jinja ({error.message}): repair it"
        ) from None
    except (RecursionError, ValueError, OverflowError):
        raise _wrong(
            "chat_template: it nests too deeply, or has a number of thousands of digits: simplify "
            "it"
        ) from None


@lru_cache(1)
def _tokens(model: Path) -> frozenset[str]:
    """The texts of the tokens in a model's tokenizer.json.

    Kept, because to parse such a file takes a moment in which a router does nothing else.
    """
    tokenizer = json.loads((model / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    added = (entry["content"] for entry in tokenizer["added_tokens"])
    return frozenset(added).union(vocabulary if isinstance(vocabulary, dict) else ())


def _wrong(remedy: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CHAT_FILE}: {remedy}", field="header.files")
