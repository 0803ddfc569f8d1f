"""Full descriptions: every thing with its size, colour and place, and the field."""

import random

from .language import join, noun, place_phrase, sentence, thing_phrase
from .scene import Scene, Thing
from .things import NUMBER_WORDS, SIZE_WORDS, plural, with_article

DESCRIBE = "Describe the picture."  # what a model is told that is to write one

_FIELD_FIRST = (
    "A {field} {word} with {items}.",
    "The {word} is {field}. There {are} {items}.",
    "On a {field} {word} there {are} {items}.",
    "This is a picture of a {field} {word} with {items}.",
)
_FIELD_LAST = (
    "{Items}, on a {field} {word}.",
    "There {are} {items}. The {word} is {field}.",
    "The picture shows {items}, all on a {field} {word}.",
    "I can see {items}. All of it is on a {field} {word}.",
)


def describe(scene: Scene, rng: random.Random) -> str:
    """Describe the whole picture: every thing with size, colour (of a shape) and place, and the field."""
    things = list(scene.things)
    if rng.random() < 0.6:
        things.sort(key=lambda thing: thing.cell)
    else:
        rng.shuffle(things)
    word = "field" if rng.random() < 0.7 else "background"
    if len(things) > 1 and rng.random() < 0.25:
        return _one_by_one(scene, things, word, rng)
    groups = _group(things) if rng.random() < 0.6 else [[thing] for thing in things]
    items = [_group_phrase(group, rng) for group in groups]
    template = rng.choice(_FIELD_FIRST if rng.random() < 0.5 else _FIELD_LAST)
    if len(things) == 1:
        template = template.replace("all on", "on").replace("All of it", "It")
    joined = join(items) if all(len(group) == 1 for group in groups) else "; ".join(items)
    text = template.format(
        field=scene.background, word=word, items=joined, Items=joined, are="is" if len(groups[0]) == 1 else "are"
    )
    return text[0].upper() + text[1:]


def _one_by_one(scene: Scene, things: list[Thing], word: str, rng: random.Random) -> str:
    """A sentence for each thing."""
    parts = []
    for thing in things:
        place = place_phrase(thing.cell, rng)
        phrase = thing_phrase(thing, rng)
        form = rng.randrange(3)
        parts.append(
            sentence((f"{place} there is {phrase}", f"there is {phrase} {place}", f"{phrase} is {place}")[form])
        )
    field = f"The {word} is {scene.background}."
    parts.insert(0 if rng.random() < 0.5 else len(parts), field)
    return " ".join(parts)


def _group(things: list[Thing]) -> list[list[Thing]]:
    groups: dict[str, list[Thing]] = {}
    for thing in things:
        groups.setdefault(thing.kind, []).append(thing)
    return list(groups.values())


def _group_phrase(group: list[Thing], rng: random.Random) -> str:
    first = group[0]
    places = [place_phrase(thing.cell, rng) for thing in group]
    if len(group) == 1:
        return f"{thing_phrase(first, rng)} {places[0]}"
    many = f"{NUMBER_WORDS[len(group)]} "
    name = plural(noun(first.kind, rng))
    if all((thing.size, thing.colour) == (first.size, first.colour) for thing in group):
        words = rng.choice(SIZE_WORDS[first.size]) + (f" {first.colour}" if first.colour else "")
        return f"{many}{words} {name}, {join([f'one {place}' for place in places])}"
    each = []
    for thing, place in zip(group, places, strict=True):
        words = rng.choice(SIZE_WORDS[thing.size]) + (f" {thing.colour}" if thing.colour else "")
        each.append(f"{with_article(words)} one {place}")
    return f"{many}{name}, {join(each)}"
