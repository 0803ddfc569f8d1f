"""Short captions: two or three things named with some of size, colour, place, number, relation and field.

A caption is kept in parts, so that its truth is exact (claims.py) and an edit of one part reads like any other.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from .claims import Claim, condition, truth_rate
from .language import join
from .scene import Scene, Thing
from .things import GRID, NUMBER_WORDS, PLACE_PHRASES, SIZE_WORDS, SYNONYMS, plural, with_article

MOST_TRUE = 0.008  # a caption may be true of 1% of the pictures; the margin is for the estimate
_TRIES = 8

# relation -> wordings, and how the claim states it: which way, and whether the second thing comes first
RELATIONS = {
    "left": (("to the left of", "left of", "on the left of"), "left", False),
    "right": (("to the right of", "right of", "on the right of"), "left", True),
    "above": (("above", "over", "higher than"), "above", False),
    "below": (("below", "under", "lower than"), "above", True),
}
_FRAMES = ("{}", "{}", "{}", "There {are} {}", "A picture of {}", "A picture with {}", "I see {}", "An image of {}")
_TOTALS = ("{n} {things}, {among} {}", "{n} {things}, including {}", "A picture of {n} {things}, {among} {}")


@dataclass(frozen=True)
class Phrase:
    """A thing as a caption names it. None leaves a part unsaid; `number` 1 is "a" (at least one), 2 and 3 are exact.
    `synonym` names the kind by its other noun if it has one; `style` picks among wordings that mean the same."""

    kind: str
    colour: str | None = None
    size: str | None = None
    cell: int | None = None
    number: int = 1
    synonym: bool = False
    style: int = 0

    def text(self) -> str:
        noun = SYNONYMS.get(self.kind, self.kind) if self.synonym else self.kind
        words = f"{SIZE_WORDS[self.size][self.style % 3]} " if self.size else ""
        words += f"{self.colour} " if self.colour else ""
        if self.number == 1:
            words = with_article(words + noun)
        else:
            words = f"{NUMBER_WORDS[self.number]} {words}{plural(noun)}"
        if self.cell is not None:
            variants = PLACE_PHRASES[self.cell]
            words += " " + variants[max(0, self.style // 16 % 5 - 2)]
        return words


@dataclass(frozen=True)
class Caption:
    """A sentence and what it claims."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None  # between the first two phrases
    field: str | None = None
    total: int | None = None  # how many things there are in all
    style: int = 0

    @cached_property
    def text(self) -> str:
        phrases = [phrase.text() for phrase in self.phrases]
        if self.relation:
            wordings = RELATIONS[self.relation][0]
            phrases[:2] = [f"{phrases[0]} {wordings[self.style % 3]} {phrases[1]}"]
        words = join(phrases)
        field_word = "field" if self.style // 3 % 3 else "background"
        if self.total is not None:
            words = _TOTALS[self.style // 9 % 3].format(
                words,
                n=NUMBER_WORDS[self.total],
                things="things" if self.style % 2 else "objects",
                among="among them",
            )
        else:
            are = "is" if self.phrases[0].number == 1 else "are"
            words = _FRAMES[self.style // 9 % len(_FRAMES)].format(words, are=are)
        if self.field:
            comma = "," if self.total is not None or self.phrases[-1].cell is not None else ""
            words += f"{comma} on a {self.field} {field_word}"
        if self.style // 72 % 2:
            return words[0].upper() + words[1:] + "."
        return words[0].lower() + words[1:] if not words.startswith("I ") else words

    @cached_property
    def claim(self) -> Claim:
        conditions = [
            condition(p.kind, p.colour, p.size, p.cell, least=p.number, **({"most": p.number} if p.number > 1 else {}))
            for p in self.phrases
        ]
        relation = None
        if self.relation:
            _, relation, swapped = RELATIONS[self.relation]
            if swapped:
                conditions[:2] = conditions[1], conditions[0]
        if self.field:
            conditions.append(condition(field=self.field))
        if self.total is not None:
            conditions.append(condition(least=self.total, most=self.total))
        return Claim(tuple(conditions), relation)

    def is_true_of(self, scene: Scene) -> bool:
        """Whether everything that the caption says holds in a picture."""
        return self.claim.is_true_of(scene)


def short_caption(scene: Scene, rng: random.Random) -> Caption:
    """Name some of a picture, so that it is true of this one and of at most about 1% of all."""
    for _ in range(_TRIES):
        caption = draw_caption(scene, rng)
        if caption is not None and specific(caption, scene):
            return caption
    return _most_specific(scene, rng)


def specific(caption: Caption, scene: Scene) -> bool:
    """Whether a caption is true of few enough pictures."""
    return truth_rate(caption.claim, scene.shapes_only) <= MOST_TRUE


def draw_style(rng: random.Random) -> int:
    return rng.randrange(720)


def draw_synonym(rng: random.Random) -> bool:
    return rng.random() < 0.2


def inconsistent(phrases: Iterable[Phrase]) -> bool:
    """Whether two phrases may mean one thing ("a dog and a small dog") or cannot both hold (two things in a cell)."""
    phrases = list(phrases)
    for i, a in enumerate(phrases):
        for b in phrases[:i]:
            if a.kind == b.kind and not (a.colour and b.colour and a.colour != b.colour):
                return True
            if a.cell is not None and a.cell == b.cell:
                return True
    return False


def draw_caption(scene: Scene, rng: random.Random) -> Caption | None:
    """A caption in one of several forms; None where the scene does not allow the form drawn."""
    count = min(rng.choice((1, 2, 2, 2, 3, 3)), len(scene.things))
    things = rng.sample(scene.things, count)
    detail = rng.choice((0.15, 0.35, 0.6))  # how much is said of each
    phrases = tuple(_phrase(scene, thing, rng, detail) for thing in things)
    if inconsistent(phrases):
        return None
    relation = field = total = None
    form = rng.random()
    if form < 0.3 and count > 1:
        relation = _relation(things[0], things[1], rng)
        phrases = tuple(replace(phrase, cell=None) for phrase in phrases)
        if any(phrase.number > 1 for phrase in phrases[:2]):
            return None
    elif form < 0.42 and len(scene.things) > sum(phrase.number for phrase in phrases):
        total = len(scene.things)
    if rng.random() < (0.7 if count == 1 else 0.3):
        field = scene.background
    return Caption(phrases, relation, field, total, draw_style(rng))


def _phrase(scene: Scene, thing: Thing, rng: random.Random, detail: float) -> Phrase:
    style, synonym = draw_style(rng), draw_synonym(rng)
    same = [other for other in scene.things if other.kind == thing.kind]
    if len(same) > 1 and rng.random() < 0.5:
        colour = thing.colour if all(other.colour == thing.colour for other in same) else None
        size = thing.size if all(other.size == thing.size for other in same) and rng.random() < detail else None
        return Phrase(thing.kind, colour, size, None, len(same), synonym, style)
    colour = thing.colour if rng.random() < 0.75 else None
    size = thing.size if rng.random() < detail else None
    cell = thing.cell if rng.random() < detail else None
    return Phrase(thing.kind, colour, size, cell, 1, synonym, style)


def _relation(first: Thing, second: Thing, rng: random.Random) -> str:
    dx = second.cell % GRID - first.cell % GRID
    dy = second.cell // GRID - first.cell // GRID
    relations = []
    if dx:
        relations.append("left" if dx > 0 else "right")
    if dy:
        relations.append("above" if dy > 0 else "below")
    return rng.choice(relations)


def _most_specific(scene: Scene, rng: random.Random) -> Caption:
    """All that is known of up to two things, and the field."""
    things = [scene.things[0]]
    things += [t for t in scene.things if (t.kind, t.colour) != (things[0].kind, things[0].colour)][:1]
    phrases = tuple(Phrase(t.kind, t.colour, t.size, t.cell, 1, draw_synonym(rng), draw_style(rng)) for t in things)
    return Caption(phrases, None, scene.background, None, draw_style(rng))
