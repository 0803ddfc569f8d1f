"""Wording: noun phrases, places and lists in plain English."""

import random
from collections.abc import Sequence

from .scene import Thing
from .things import NUMBER_WORDS, PLACE_PHRASES, SIZE_WORDS, SYNONYMS, plural, with_article


def noun(kind: str, rng: random.Random) -> str:
    """The kind's noun, now and then a synonym of it."""
    if kind in SYNONYMS and rng.random() < 0.2:
        return SYNONYMS[kind]
    return kind


def thing_phrase(thing: Thing, rng: random.Random, article: bool = True, size: bool = True) -> str:
    """ "a small red circle", with its size and colour."""
    words = f"{rng.choice(SIZE_WORDS[thing.size])} " if size else ""
    words += f"{thing.colour} " if thing.colour else ""
    words += noun(thing.kind, rng)
    return with_article(words) if article else words


def place_phrase(cell: int, rng: random.Random) -> str:
    """ "in the top left corner"; the first wording is the most frequent."""
    phrases = PLACE_PHRASES[cell]
    return phrases[0] if rng.random() < 0.5 else rng.choice(phrases)


def number_phrase(count: int, words: str, last: str) -> str:
    """ "two small dogs": a number before `words`, whose last word `last` is put in the plural."""
    return f"{NUMBER_WORDS[count]} {words}{plural(last) if count != 1 else last}"


def join(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."
