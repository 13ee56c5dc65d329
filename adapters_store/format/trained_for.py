"""Whether an adapter was trained for another base model than the one served, by their names.

One model has many names: the hub's, a copy's by another organisation, a quantised copy's, a folder
on a trainer's disk. So names are not compared. What is compared is what both names state: family,
version, release, line, and whether the model was taught to follow instructions. Other words mean
nothing. A name without a known family and a number says nothing, and nothing is refused because of
it. A short name, without the model's size, states its family and the beginning of its version.
"""

import re
from dataclasses import dataclass, replace

from granatum.adapters_store.format.modules import CONFIG_FILE
from granatum.adapters_store.names import shown
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidAdapter

_FAMILIES = frozenset(
    (
        *("llama", "codellama", "tinyllama", "mistral", "ministral", "mixtral", "qwen", "qwq"),
        *("phi", "granite", "smollm", "gemma", "falcon", "yi", "olmo", "internlm", "starcoder"),
        *("stablelm", "exaone", "bloom", "pythia", "baichuan", "minicpm", "deepseek"),
    )
)
_FINETUNED = frozenset(
    (
        *("vicuna", "zephyr", "hermes", "openhermes", "dolphin", "openchat", "tulu", "starling"),
        *("wizardlm", "wizardcoder", "orca", "nemotron", "abliterated", "uncensored"),
    )
)
"""Well-known models that others were trained into; their weights are their own."""
_LINES = frozenset(
    (
        *("coder", "code", "python", "math", "nemo", "thinking", "reasoning", "vl", "vision"),
        *("guard", "1m", "deepseek"),  # DeepSeek trained other families' models into its own
    )
)
"""Lines of a family beside its plain one."""
_SYNONYMS = {"distill": "deepseek"}
_INSTRUCTED = frozenset(("instruct", "inst", "it", "chat"))
_PLAIN_IS_INSTRUCTED = frozenset(
    (("qwen", "3"), ("smollm", "3"), ("phi", "3"), ("phi", "35"), ("phi", "4"))
)
"""Families and versions where the plain name is the instructed model's, and `base` the other's."""
_VERSION = re.compile(rf"(?<![a-z])({'|'.join(sorted(_FAMILIES))})-?(\d+(?:\.\d+)?)(?![a-z0-9.])")
_RELEASE = re.compile(r"(?<![a-z0-9])v(\d+(?:\.\d+)?)(?![a-z0-9.])")
_DATE = re.compile(r"(?<![a-z0-9.])(2[3-9](?:0[1-9]|1[0-2]))(?![a-z0-9.])")
_CONTEXT = re.compile(r"(?<![a-z0-9.])(\d+k)(?![a-z0-9.])")
_SIZE = re.compile(r"(?<![a-z0-9.])(?:\d+(?:\.\d+)?[bm]|mini|small|medium|large)(?![a-z0-9])")


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a model's name states; empty where it says nothing."""

    families: frozenset[str]
    lines: frozenset[str]
    version: str
    release: str = ""
    date: str = ""
    context: str = ""
    kind: str = ""
    is_short: bool = True

    @classmethod
    def by(cls, name: str) -> "_Stated":
        text = _plain(name)
        # Models with 1M in their names were trained on; they are a line of their own.
        words = frozenset(_SYNONYMS.get(word, word) for word in re.findall(r"1m\b|[a-z]+", text))
        version = _VERSION.search(text)
        stated = cls(
            families=words & _FAMILIES,
            lines=words & (_FINETUNED | _LINES),
            version=_digits(version[2]) if version else "",
            release=_digits(found[1]) if (found := _RELEASE.search(text)) else "",
            date=found[1] if (found := _DATE.search(text)) else "",
            context=found[1] if (found := _CONTEXT.search(text)) else "",
            is_short=_SIZE.search(text) is None,
        )
        return replace(stated, kind=stated._kind(words, version[1] if version else ""))

    def _kind(self, words: frozenset[str], family: str) -> str:
        """Short names leave out what was taught; so do those of finetuned models."""
        if self.lines & _FINETUNED:
            return ""
        if words & _INSTRUCTED:
            return "instructed"
        if "base" in words:
            return "base"
        if (family, self.version) in _PLAIN_IS_INSTRUCTED:
            return "instructed"
        is_whole = not self.is_short and (self.version or self.release or self.date)
        return "base" if is_whole else ""

    @property
    def says_something(self) -> bool:
        is_numbered = self.version or self.release or self.date or not self.is_short
        return bool(is_numbered and (self.families or self.lines & _FINETUNED))

    def difference(self, other: "_Stated") -> str:
        """The first thing that both state and that differs; empty if nothing does."""
        if self.families and other.families and not self.families & other.families:
            return "family"
        is_short = self.is_short or other.is_short
        if self.lines != other.lines and not is_short:
            return "line"
        for field in ("version", "release", "date", "context"):
            ours, theirs = sorted((getattr(self, field), getattr(other, field)))
            # The next line: `llama3` may be short for Llama 3.1.
            if ours and not (theirs.startswith(ours) if is_short else ours == theirs):
                return "version"
        if self.kind and other.kind and self.kind != other.kind:
            return "kind, instructed or not"
        return ""


def check_trained_for(name: str, base: BaseModel, asked_for: str) -> None:
    """Raise InvalidAdapter if the adapter's base model, `name`, is clearly not `base`.

    `asked_for` is the upload's own word for the adapter's base model: if it is `name`, the tenant
    knows, and the names are not compared. Empty: the tenant said nothing.
    """
    if asked_for and asked_for != name:
        raise InvalidAdapter(
            f"header.base_model is {shown(asked_for)}, but {CONFIG_FILE} says {shown(name)} in "
            "base_model_name_or_path: give the same, or leave it out",
            field="header.base_model",
        )
    if asked_for:
        return
    trained = _Stated.by(name)
    served, stated = _served(base, trained)
    if not (stated.says_something and trained.says_something):
        return
    difference = trained.difference(stated)
    if difference:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: base_model_name_or_path is {name!r}, but {shown(served)} is "
            f"served here (another {difference}): upload an adapter that was trained for it. If it "
            f"is the same model, say so with --for-base {name!r} (header.base_model)",
            field=CONFIG_FILE,
        )


def _served(base: BaseModel, trained: _Stated) -> tuple[str, _Stated]:
    """The name that says what is served, and what it states beside what `trained` states.

    A model's `_name_or_path` may be that of the model which it was trained from: then family and
    version hold, and nothing else needs to.
    """
    stated = _Stated.by(base.name)
    if stated.says_something:
        return base.name, stated
    stated = _Stated.by(base.origin)
    return base.origin, replace(trained, families=stated.families, version=stated.version)


def _plain(name: str) -> str:
    """The model's own part of a name or path: in lower case, with `-` between words."""
    parts = [part for part in re.split(r"[/\\]", name.partition("@")[0].lower()) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    text = cached[0] if cached else parts[-1] if parts else ""
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)
    text = re.sub(r"[_\s:+]+", "-", text)
    text = re.sub(r"\b(code|tiny)-llama", r"\1llama", text)
    return re.sub(r"(?<![\d.])(\d)-(\d)(?=-(?!bit)|$)", r"\1.\2", text)  # llama-3-1-8b


def _digits(number: str) -> str:
    """A version's digits: `3.1` and `31` are the same, `3.0` and `3` too."""
    return number.removesuffix(".0").replace(".", "")
