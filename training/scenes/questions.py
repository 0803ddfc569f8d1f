"""Questions about a scene, each with its one canonical answer.

Every kind draws the wanted answer first and then looks for a question that has it, so that wording tells nothing.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .language import noun, place_phrase
from .scene import Scene, Thing, draw_kind
from .things import COLOURS, GRID, PLACES, SHAPES, SIZE_WORDS, SIZES, plural, with_article

QUESTION_KINDS = ("presence", "count", "size", "colour", "background", "place", "neighbour", "compare")
TRAINING_KINDS = QUESTION_KINDS + ("where",)

_PRESENCE = (
    "Is there {a} in the picture?",
    "Is there {a}?",
    "Do you see {a}?",
    "Can you see {a} in the image?",
    "Does the picture show {a}?",
)
_COUNT = (
    "How many {things} are there?",
    "How many {things} can you see?",
    "How many {things} are in the picture?",
    "What is the number of {things}?",
    "Count the {things}.",
)
_SIZE = (
    "Is {the} small or large?",
    "Is {the} large or small?",
    "What size is {the}, small or large?",
    "How big is {the}, large or small?",
)
_COLOUR = (
    "What colour is {the}?",
    "What color is {the}?",
    "Which colour does {the} have?",
    "What is the colour of {the}?",
)
_BACKGROUND = (
    "What colour is the field?",
    "What colour is the background?",
    "What is the color of the background?",
    "Which colour does the field have?",
    "Which colour is the background?",
)
_PLACE = ("What is {place}?", "What is there {place}?", "What can you see {place}?", "Which thing is {place}?")
_NEIGHBOUR = (
    "What is {beside} {the}?",
    "What is there {beside} {the}?",
    "Which thing is {beside} {the}?",
    "What can you see {beside} {the}?",
)
_BESIDE = {
    (-1, 0): ("to the left of", "left of", "directly to the left of", "on the left of"),
    (1, 0): ("to the right of", "right of", "directly to the right of", "on the right of"),
    (0, -1): ("above", "directly above", "right above", "over"),
    (0, 1): ("below", "directly below", "right below", "under"),
}
_COMPARE = {
    "more": ("Are there more {a} than {b}?", "Do you see more {a} than {b}?", "Can you see more {a} than {b}?"),
    "fewer": ("Are there fewer {a} than {b}?", "Do you see fewer {a} than {b}?", "Can you see fewer {a} than {b}?"),
    "equal": ("Are there as many {a} as {b}?", "Are there just as many {a} as {b}?", "Do you see as many {a} as {b}?"),
}
_WHERE = (
    "Where is {the}?",
    "Where can you see {the}?",
    "Where in the picture is {the}?",
    "In which place is {the}?",
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] = QUESTION_KINDS) -> list[Question]:
    """Ask up to `count` different questions, kind after kind in turn; what the scene does not allow is left out.

    Args:
        rng: a `random.Random`; the same state asks the same questions.
        kinds: of TRAINING_KINDS.

    Raises ValueError for an unknown kind or a count below 0.
    """
    return draw_questions(_ASK, scene, rng, count, kinds)


def draw_questions(
    makers: Mapping[str, Callable[[Any, random.Random], tuple[str, str] | None]],
    subject: Any,
    rng: random.Random,
    count: int,
    kinds: Sequence[str],
) -> list[Question]:
    """The loop of `ask`: up to `count` different questions about `subject`.

    Args:
        makers: by kind, what draws text and answer, or None where this draw is not possible.
    """
    for kind in kinds:
        if kind not in makers:
            raise ValueError(f"unknown kind of question {kind!r}; choose from {', '.join(makers)}")
    if count < 0:
        raise ValueError(f"the number of questions is {count}; pass 0 or more")
    left = list(kinds)
    rng.shuffle(left)
    questions: list[Question] = []
    seen: set[str] = set()
    misses = dict.fromkeys(left, 0)
    while left and len(questions) < count:
        for kind in list(left):
            if len(questions) == count:
                break
            asked = makers[kind](subject, rng)
            if asked is None or asked[0] in seen:
                misses[kind] += 1
                if misses[kind] == 4:
                    left.remove(kind)
                continue
            seen.add(asked[0])
            questions.append(Question(kind, *asked))
    return questions


_Asked = tuple[str, str] | None  # text and answer; None where the draw is not possible in this scene


def _presence(scene: Scene, rng: random.Random) -> _Asked:
    yes = rng.random() < 0.5
    shape = scene.shapes_only or rng.random() < 0.3
    things = [thing for thing in scene.things if (thing.kind in SHAPES) == shape]
    if rng.random() < 0.5:  # a kind
        if yes:
            words = noun(rng.choice(things).kind, rng) if things else None
        elif shape and not scene.shapes_only and rng.random() < 0.5:  # as rare as a shape that is there
            words = None
        else:
            kind = _absent(scene, rng, shape)
            words = kind and noun(kind, rng)
    elif not things:
        words = None
    else:  # a shape with its colour, another kind with its size
        draw = _coloured_shape if shape else _sized_kind
        words = next(filter(None, (draw(scene, things, rng, yes) for _ in range(12))), None)
    if words is None:
        return None
    return rng.choice(_PRESENCE).format(a=with_article(words)), "yes" if yes else "no"


def _coloured_shape(scene: Scene, things: list[Thing], rng: random.Random, yes: bool) -> str | None:
    kind, colour = rng.choice(things).kind, _draw_colour(scene, rng)
    if yes:
        thing = rng.choice(things)
        kind, colour = thing.kind, thing.colour
    elif rng.random() < 0.3:  # the colour of a thing, another shape
        kind, colour = rng.choice(SHAPES), rng.choice(things).colour
    there = any((thing.kind, thing.colour) == (kind, colour) for thing in things)
    return f"{colour} {kind}" if there == yes else None


def _sized_kind(scene: Scene, things: list[Thing], rng: random.Random, yes: bool) -> str | None:
    kind = rng.choice(things).kind
    size = rng.choice(tuple(SIZES))
    there = any((thing.kind, thing.size) == (kind, size) for thing in things)
    return f"{rng.choice(SIZE_WORDS[size])} {noun(kind, rng)}" if there == yes else None


def _count(scene: Scene, rng: random.Random) -> _Asked:
    form = rng.random()
    if form < 0.2:
        words, number = rng.choice(("things", "objects")), len(scene.things)
    elif form < 0.3:
        size = rng.choice(tuple(SIZES))
        words = f"{rng.choice(SIZE_WORDS[size])} things"
        number = sum(thing.size == size for thing in scene.things)
    elif form < 0.38:
        words, number = "shapes", sum(thing.colour is not None for thing in scene.things)
        if number == 0 and rng.random() < 0.5:  # else half of the answers would be 0
            return None
    else:
        repeated = [kind for kind, n in scene.counts.items() if n > 1]
        if repeated and rng.random() < 0.7:
            kind = rng.choice(repeated)
        elif rng.random() < 0.5:
            kind = rng.choice(list(scene.counts))
        else:
            kind = _absent(scene, rng)
        if kind is None:
            return None
        words, number = plural(noun(kind, rng)), scene.counts.get(kind, 0)
    return rng.choice(_COUNT).format(things=words), str(number)


def _size(scene: Scene, rng: random.Random) -> _Asked:
    thing = rng.choice(scene.things)
    the = _referent(scene, thing, rng)
    return (rng.choice(_SIZE).format(the=the), thing.size) if the else None


def _colour(scene: Scene, rng: random.Random) -> _Asked:
    shapes = [thing for thing in scene.things if thing.colour]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    same = [other for other in shapes if other.kind == thing.kind]
    sized = [other for other in same if other.size == thing.size]
    if rng.random() < 0.2:
        the = f"the {rng.choice(('shape', thing.kind))} {place_phrase(thing.cell, rng)}"
    elif len(same) == 1:
        the = f"the {thing.kind}"
    elif len(sized) == 1:
        the = f"the {rng.choice(SIZE_WORDS[thing.size])} {thing.kind}"
    else:
        the = f"the {thing.kind} {place_phrase(thing.cell, rng)}"
    return rng.choice(_COLOUR).format(the=the), thing.colour


def _background(scene: Scene, rng: random.Random) -> _Asked:
    return rng.choice(_BACKGROUND), scene.background


def _place(scene: Scene, rng: random.Random) -> _Asked:
    empty = rng.random() < 0.15
    if empty:
        cell = rng.choice([cell for cell in range(len(PLACES)) if cell not in scene.cells])
        answer = "nothing"
    else:
        thing = rng.choice(scene.things)
        cell, answer = thing.cell, thing.kind
    return rng.choice(_PLACE).format(place=place_phrase(cell, rng)), answer


def _neighbour(scene: Scene, rng: random.Random) -> _Asked:
    nothing = rng.random() < 0.2
    found = []
    for thing in scene.things:
        column, row = thing.cell % GRID, thing.cell // GRID
        for dx, dy in _BESIDE:
            line = [  # all cells from the thing to the edge; an empty one before a full one is not asked about
                scene.cells.get((row + dy * i) * GRID + column + dx * i)
                for i in (1, 2)
                if 0 <= column + dx * i < GRID and 0 <= row + dy * i < GRID
            ]
            if (not any(line)) if nothing else (line and line[0]):
                found.append((thing, (dx, dy), line))
    if not found:
        return None
    thing, direction, line = rng.choice(found)
    the = _referent(scene, thing, rng, by_place=False)
    if the is None:
        return None
    text = rng.choice(_NEIGHBOUR).format(beside=rng.choice(_BESIDE[direction]), the=the)
    return text, "nothing" if nothing else line[0].kind


def _compare(scene: Scene, rng: random.Random) -> _Asked:
    relation = rng.choice(tuple(_COMPARE))
    asked = _compare_sizes(scene, rng, relation) if rng.random() < 0.2 else _compare_kinds(scene, rng, relation)
    if asked is None:
        return None
    words, answer = asked
    return rng.choice(_COMPARE[relation]).format(a=words[0], b=words[1]), answer


def _compare_sizes(scene: Scene, rng: random.Random, relation: str) -> tuple[list[str], str] | None:
    sizes = rng.sample(tuple(SIZES), 2)
    numbers = [sum(thing.size == size for thing in scene.things) for size in sizes]
    yes = _holds(relation, *numbers)
    if not yes and rng.random() > (0.27 if relation == "equal" else 0.65):  # else most answers would be no
        return None
    return [f"{rng.choice(SIZE_WORDS[size])} things" for size in sizes], "yes" if yes else "no"


def _compare_kinds(scene: Scene, rng: random.Random, relation: str) -> tuple[list[str], str] | None:
    counts = scene.counts
    if relation == "equal" and len(set(counts.values())) == len(counts):
        return None  # yes is not possible, so no would be known
    yes = rng.random() < 0.5
    repeated = [kind for kind, n in counts.items() if n > 1]
    for _ in range(30):
        first = rng.choice(repeated) if repeated and rng.random() < 0.7 else rng.choice(list(counts))
        others = [kind for kind in counts if kind != first]
        second = rng.choice(others) if others and rng.random() < 0.75 else _absent(scene, rng)
        if second is None:
            continue
        kinds = [first, second]
        rng.shuffle(kinds)
        if _holds(relation, *(counts.get(kind, 0) for kind in kinds)) == yes:
            return [plural(noun(kind, rng)) for kind in kinds], "yes" if yes else "no"
    return None


def _holds(relation: str, a: int, b: int) -> bool:
    return {"more": a > b, "fewer": a < b, "equal": a == b}[relation]


def _where(scene: Scene, rng: random.Random) -> _Asked:
    if rng.random() < 0.12:
        kind = _absent(scene, rng)
        if kind is None:
            return None
        words = f"{_draw_colour(scene, rng)} {kind}" if kind in SHAPES and rng.random() < 0.4 else noun(kind, rng)
        return rng.choice(_WHERE).format(the=f"the {words}"), "nowhere"
    thing = rng.choice(scene.things)
    the = _referent(scene, thing, rng, by_place=False)
    return (rng.choice(_WHERE).format(the=the), thing.place) if the else None


_ASK: dict[str, Callable[[Scene, random.Random], _Asked]] = {
    "presence": _presence,
    "count": _count,
    "size": _size,
    "colour": _colour,
    "background": _background,
    "place": _place,
    "neighbour": _neighbour,
    "compare": _compare,
    "where": _where,
}


def _referent(scene: Scene, thing: Thing, rng: random.Random, by_place: bool = True) -> str | None:
    """Name one thing so that no other is meant: "the dog", "the red circle", or by its place; None if none will do."""
    if by_place and rng.random() < 0.15:
        return f"the {rng.choice(('thing', thing.kind))} {place_phrase(thing.cell, rng)}"
    if scene.counts[thing.kind] == 1 and (thing.colour is None or rng.random() < 0.6):
        return f"the {noun(thing.kind, rng)}"
    if thing.colour and [(t.kind, t.colour) for t in scene.things].count((thing.kind, thing.colour)) == 1:
        return f"the {thing.colour} {thing.kind}"
    return f"the {noun(thing.kind, rng)} {place_phrase(thing.cell, rng)}" if by_place else None


def _absent(scene: Scene, rng: random.Random, shape: bool | None = None) -> str | None:
    """A kind that the picture does not hold, drawn as kinds are drawn for pictures."""
    for _ in range(20):
        if shape is None:
            kind = draw_kind(rng, scene.shapes_only)
        else:
            kind = rng.choice(SHAPES) if shape else draw_kind(rng)
            if shape != (kind in SHAPES):
                continue
        if kind not in scene.counts:
            return kind
    return None


def _draw_colour(scene: Scene, rng: random.Random) -> str:
    return rng.choice([colour for colour in COLOURS if colour != scene.background])
