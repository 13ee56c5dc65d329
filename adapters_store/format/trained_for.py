"""Whether an adapter was trained for another base model than the one served, by their names.

One model has many names: the hub's, a copy's by another organisation, a quantised copy's, a folder
on a trainer's disk. So names are not compared. What is compared is what both names state: family,
version, release, line, and whether the model was taught to follow instructions. Other words mean
nothing. A name without a known family or line says nothing, and nothing is refused because of it.
"""

import re
from dataclasses import dataclass

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
        *("wizardlm", "wizardcoder", "orca", "nemotron", "distill", "abliterated", "uncensored"),
    )
)
"""Well-known models that others were trained into; their weights are their own."""
_LINES = frozenset(("coder", "code", "math", "nemo", "thinking", "vl", "vision", "guard"))
"""Lines of a family beside its plain one."""
_INSTRUCTED = frozenset(("instruct", "inst", "chat"))
_PLAIN_IS_INSTRUCTED = frozenset(
    (("qwen", "3"), ("smollm", "3"), ("phi", "3"), ("phi", "35"), ("phi", "4"))
)
"""Families and versions where the plain name is the instructed model's, and `base` the other's."""
_VERSION = re.compile(rf"(?<![a-z])({'|'.join(sorted(_FAMILIES))})-?(\d+(?:\.\d+)?)(?![a-z0-9.])")
_RELEASE = re.compile(r"(?<![a-z0-9])v(\d+(?:\.\d+)?)(?![a-z0-9.])")
_DATE = re.compile(r"(?<![a-z0-9.])(2[3-9](?:0[1-9]|1[0-2]))(?![a-z0-9.])")


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a model's name states; empty where it says nothing."""

    families: frozenset[str]
    lines: frozenset[str]
    version: str
    release: str
    date: str
    instructed: bool

    @classmethod
    def by(cls, name: str) -> "_Stated":
        text = _plain(name)
        words = frozenset(re.findall(r"[a-z]+", text))
        version = _VERSION.search(text)
        number = _digits(version[2]) if version else ""
        plain = version is not None and (version[1], number) in _PLAIN_IS_INSTRUCTED
        return cls(
            families=words & _FAMILIES,
            lines=words & (_FINETUNED | _LINES),
            version=number,
            release=_digits(found[1]) if (found := _RELEASE.search(text)) else "",
            date=found[1] if (found := _DATE.search(text)) else "",
            instructed=bool(words & _INSTRUCTED) or (plain and "base" not in words),
        )

    @property
    def says_something(self) -> bool:
        return bool(self.families or self.lines)

    def difference(self, other: "_Stated") -> str:
        """The first thing that both state and that differs; empty if nothing does."""
        if self.families and other.families and not self.families & other.families:
            return "family"
        if self.lines != other.lines:
            return "line"
        for field in ("version", "release", "date"):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours and theirs and ours != theirs:
                return "version"
        # A finetuned model's short name seldom says that it was instructed.
        if self.instructed != other.instructed and not self.lines & _FINETUNED:
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
    served = next((s for s in base.names if _Stated.by(s).says_something), "")
    trained = _Stated.by(name)
    if asked_for or not served or not trained.says_something:
        return
    difference = trained.difference(_Stated.by(served))
    if difference:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: base_model_name_or_path is {name!r}, but {shown(served)} is "
            f"served here (another {difference}): upload an adapter that was trained for it. If it "
            f"is the same model, say so with --for-base {name!r} (header.base_model)",
            field=CONFIG_FILE,
        )


def _plain(name: str) -> str:
    """The model's own part of a name or path: in lower case, with `-` between words."""
    parts = [part for part in re.split(r"[/\\]", name.partition("@")[0].lower()) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    text = cached[0] if cached else parts[-1] if parts else ""
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)
    text = re.sub(r"[_\s:+]+", "-", text)
    return re.sub(r"(?<![\d.])(\d)-(\d)(?=-(?!bit)|$)", r"\1.\2", text)  # llama-3-1-8b


def _digits(number: str) -> str:
    """A version's digits: `3.1` and `31` are the same, `3.0` and `3` too."""
    return number.removesuffix(".0").replace(".", "")
