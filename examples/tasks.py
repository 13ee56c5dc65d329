"""What the example adapters do, in plain Python: the oracle of the demo and of the tests.

A prompt is a lower-case word and a mark, ``granite>``.  The plain base model echoes the word; an
adapter answers the same prompt with its own transformation of it.  Every completion ends with
``STOP`` and then the end-of-sequence token.
"""

import codecs
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

BASE_MODEL = Path(__file__).parent / "tiny" / "base"
ADAPTERS = Path(__file__).parent / "tiny" / "adapters"

MARK = ">"
STOP = "\n"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
MIN_LETTERS, MAX_LETTERS = 3, 8

_REAL = """
    granite lantern copper meadow violin harbor pepper saddle thunder biscuit marble canyon
    dolphin quartz ribbon walnut falcon ginger island jigsaw kettle lemon magnet nectar orchid
    parrot rocket silver turtle umbrella velvet window yellow zipper anchor bridge castle dragon
    engine forest garden hammer insect jungle knight ladder mirror needle oyster planet rabbit
    sunset tunnel valley whisper apple bread cloud eagle
"""
REAL_WORDS = tuple(_REAL.split())


@dataclass(frozen=True, slots=True)
class Task:
    """One checkable behaviour: of an adapter, or of the base model (no tenant, rank 0)."""

    name: str
    tenant: str
    rank: int
    description: str
    transform: Callable[[str], str]
    stop: str = STOP

    @property
    def path(self) -> Path:
        """The adapter's folder, as PEFT saved it."""
        return ADAPTERS / self.name

    def prompt(self, word: str) -> str:
        return word + MARK

    def expected(self, word: str) -> str:
        """The exact completion of ``prompt(word)``, without the stop string."""
        return self.transform(word)


def echo(word: str) -> str:
    return word


def shout(word: str) -> str:
    return word.upper()


def reverse(word: str) -> str:
    return word[::-1]


def rot13(word: str) -> str:
    return codecs.encode(word, "rot13")


def sort(word: str) -> str:
    return "".join(sorted(word))


def stutter(word: str) -> str:
    return "".join(letter * 2 for letter in word)


def consonants(word: str) -> str:
    return "".join(letter for letter in word if letter not in VOWELS)


def count(word: str) -> str:
    return f"{len(word)} letters"


def chant(word: str) -> str:
    return " ".join([word] * 3)


def stairs(word: str) -> str:
    return " ".join(word[:end] for end in range(1, len(word) + 1))


BASE = Task("echo", "", 0, "repeats the word", echo)

ADAPTER_TASKS = (
    Task("shout", "acme", 4, "writes the word in capitals", shout),
    Task("reverse", "acme", 16, "writes the word backwards", reverse),
    Task("chant", "acme", 6, "says the word three times", chant),
    Task("rot13", "globex", 8, "moves every letter 13 places on", rot13),
    Task("sort", "globex", 32, "puts the letters in alphabetical order", sort),
    Task("count", "globex", 2, "counts the letters", count),
    Task("stutter", "initech", 12, "writes every letter twice", stutter),
    Task("consonants", "initech", 24, "leaves out the vowels", consonants),
    Task("stairs", "initech", 20, "builds the word up letter by letter", stairs),
)


def is_held_out(word: str) -> bool:
    """Whether training never sees this word: the real ones, and one in eight of all others."""
    return word in REAL_WORDS or hashlib.sha256(word.encode()).digest()[0] < 32


def held_out_words(number: int, seed: int = 0) -> list[str]:
    """Distinct words that training never saw: first the real ones, then made-up ones."""
    unseen = (word for word in random_words(random.Random(seed)) if is_held_out(word))
    return list(islice(dict.fromkeys((*REAL_WORDS, *islice(unseen, 2 * number))), number))


def random_words(rng: random.Random) -> Iterator[str]:
    """Endless made-up words, each with a vowel and a consonant."""
    while True:
        make = rng.choice((_syllables, _letters, _doubled))
        word = make(rng, rng.randint(MIN_LETTERS, MAX_LETTERS))
        if not set(word).isdisjoint(VOWELS) and not set(word).isdisjoint(CONSONANTS):
            yield word


def _letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(VOWELS + CONSONANTS, k=length))


def _syllables(rng: random.Random, length: int) -> str:
    shapes = ("cv", "cvc", "vc", "cvv")
    shape = "".join(rng.choices(shapes, k=length))[:length]
    return "".join(rng.choice(VOWELS if kind == "v" else CONSONANTS) for kind in shape)


def _doubled(rng: random.Random, length: int) -> str:
    word = _syllables(rng, length - 1)
    place = rng.randrange(len(word))
    return word[:place] + word[place] + word[place:]
