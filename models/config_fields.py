"""The fields of a config.json, each checked as it is read."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from granatum.v1.errors import InvalidRequest

MOST = 1 << 24
"""No dimension of a model is larger."""
_PUBLISHED = "take the config.json that was published with the model"


@dataclass(frozen=True, slots=True)
class Fields:
    """An object of config.json: its values, and where they stand, for messages.

    Every reader takes a field's default, and raises InvalidRequest with the field's name.
    """

    values: Mapping[str, Any]
    place: str

    @classmethod
    def read(cls, file: Path) -> "Fields":
        """All of a config.json."""
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{file} cannot be read as a model's config.json ({error}): {_PUBLISHED}"
            ) from error
        if not isinstance(values, dict):
            raise InvalidRequest(f"{file} is not a JSON object: {_PUBLISHED}")
        return cls(values, f"{file}: ")

    def inner(self, name: str) -> "Fields":
        """The object that is a field; an empty one if the field is absent, null or empty."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value, f"{self.place}{name}.")

    def whole(self, name: str, default: int | None = None, most: int = MOST) -> int:
        """A positive whole number up to `most`. Without a default it must be there."""
        found = self.whole_or_none(name, default, most)
        if found is None:
            raise InvalidRequest(f"{self.place}{name} is missing: {_PUBLISHED}")
        return found

    def whole_or_none(self, name: str, default: int | None, most: int = MOST) -> int | None:
        """A positive whole number up to `most`.

        None if the field is null, or if the field and the default are absent.
        """
        value = self.values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "a positive whole number")
        if value > most:
            self.refuse(name, f"at most {most:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "a number")
        if not 0 < value <= sys.float_info.max:
            self.refuse(name, "positive and finite")
        return float(value)

    def number_or(self, name: str, default: float) -> float:
        """A finite positive number; the default also where the field is 0 or false."""
        return self.number(name) if self.values.get(name) else float(default)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite positive numbers."""
        values = self.values.get(name)
        if not isinstance(values, list) or len(values) != count:
            self.refuse(name, f"a list of {count} numbers")
        items = {str(index): value for index, value in enumerate(values)}
        inner = Fields(items, f"{self.place}{name}.")
        return tuple(inner.number(index) for index in items)

    def ids(self, name: str) -> list[int]:
        """A token id, or a list of them; none if the field is absent or null."""
        value = self.values.get(name)
        found = [id_ for id_ in (value if isinstance(value, list) else [value]) if id_ is not None]
        if any(type(id_) is not int for id_ in found):
            self.refuse(name, "a token id or a list of token ids")
        return found

    def flag(self, name: str) -> bool:
        """True or false; false if the field is absent or null."""
        value = self.values.get(name)
        if value not in (None, True, False):
            self.refuse(name, "true or false")
        return bool(value)

    def require(self, name: str, only: object) -> None:
        """Refuse the field unless it is absent, null or equal to `only`."""
        if self.values.get(name) not in (None, only):
            self.refuse(name, json.dumps(only))

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise InvalidRequest: the field's value cannot be served, `supported` says what can."""
        raise InvalidRequest(
            f"{self.place}{name} = {json.dumps(self.values.get(name))} is not supported: "
            f"it must be {supported}"
        )
