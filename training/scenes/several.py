"""Questions about several pictures at once: which of them, how many of them, and what is in the second one.

Pictures are numbered from 1 in the order of the prompt. As with one picture, the wanted answer is drawn first.
"""

import random
from collections.abc import Callable, Sequence

from .language import join, noun
from .questions import Question, ask, draw_questions
from .scene import Scene, draw_kind
from .things import BACKGROUNDS, COLOURS, SHAPES, with_article

SEVERAL_KINDS = ("which", "how many", "field", "most", "presence", "detail")
DETAIL_KINDS = ("background", "colour", "count", "neighbour", "place", "size")  # of a question about one of them
NONE = "none"
NONE_SHARE = 0.12  # of the answers of "which" and "field", and "0" of "how many"
_SHARED = 0.6  # of the companions are looked for because they share a thing with an earlier picture
_TRIES = 40

_WHICH = (
    "Which pictures show {a}?",
    "Which pictures have {a}?",
    "Which of the pictures show {a}?",
    "Which of these pictures has {a}?",
    "In which pictures is there {a}?",
    "In which pictures can you see {a}?",
)
_HOW_MANY = (
    "How many pictures show {a}?",
    "How many pictures have {a}?",
    "How many of the pictures show {a}?",
    "How many of these pictures have {a}?",
    "In how many pictures is there {a}?",
)
_FIELD = (
    "Which pictures have {a}?",
    "Which picture has {a}?",
    "Which of these pictures has {a}?",
    "Which of the pictures have {a}?",
)
_MOST = {
    max: ("Which picture has the most things?", "Which picture shows the most things?"),
    min: ("Which picture has the fewest things?", "Which picture shows the fewest things?"),
}
_PRESENCE = (
    "Is there {a} in picture {n}?",
    "Do you see {a} in picture {n}?",
    "Can you see {a} in picture {n}?",
    "Does picture {n} show {a}?",
)

Draw = tuple[str, str] | None  # text and answer; None where the draw is not possible with these pictures
_Kind = tuple[str, str | None]  # a kind of thing, and the colour where one is named


def ask_several(
    scenes: Sequence[Scene], rng: random.Random, count: int, kinds: Sequence[str] = SEVERAL_KINDS
) -> list[Question]:
    """Ask up to `count` different questions about pictures that a prompt shows together, kind after kind in turn.

    Args:
        scenes: two or more, in the order of the prompt.
        rng: a `random.Random`; the same state asks the same questions.
        kinds: of SEVERAL_KINDS. "which", "how many" and "field" look for a thing or a field in all pictures, "most"
            compares their numbers of things, "presence" and "detail" ask about the one picture that they name.

    Raises ValueError for fewer than two scenes, an unknown kind or a count below 0.
    """
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} scene(s) given; pass two or more, or use ask() for one")
    return draw_questions(_ASK, scenes, rng, count, kinds)


def companions(scene_at: Callable[[int], Scene], pool: int, first: int, count: int, rng: random.Random) -> list[int]:
    """Choose scenes to show together with the one numbered `first`: `count` numbers in all, in random order.

    Pictures that have nothing in common would leave "which" and "how many" with one picture or none as the answer, so
    most are looked for until one shows a thing that an earlier one shows, too.

    Args:
        scene_at: the scene of a number in 0..pool - 1.

    Raises ValueError if the pool holds fewer scenes than wanted.
    """
    if count > pool:
        raise ValueError(f"{count} different pictures are wanted and there are {pool}; draw more pictures")
    chosen = [first]
    kinds = list(scene_at(first).counts)
    while len(chosen) < count:
        wanted = rng.choice(kinds) if rng.random() < _SHARED else None
        for _ in range(_TRIES):
            index = rng.randrange(pool)
            if index not in chosen and (wanted is None or wanted in scene_at(index).counts):
                break
        else:  # a rare thing, or a small pool
            index = rng.choice([i for i in range(pool) if i not in chosen])
        chosen.append(index)
        kinds += scene_at(index).counts
    rng.shuffle(chosen)
    return chosen


def _which(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    return _list_of(_holders(scenes), lambda: _absent(scenes, rng), _WHICH, rng)


def _field(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    return _list_of(_fields(scenes), lambda: _absent_field(scenes, rng), _FIELD, rng, _field_phrase)


def _how_many(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    of_fields = rng.random() < 0.35
    holders = _fields(scenes) if of_fields else _holders(scenes)
    if rng.random() < NONE_SHARE:
        named, number = _absent_field(scenes, rng) if of_fields else _absent(scenes, rng), 0
    else:
        named = _with_drawn_number(holders, rng)
        number = len(holders[named])
    if named is None:
        return None
    phrase = _field_phrase(named, rng) if of_fields else _thing_phrase(named, rng)
    return rng.choice(_HOW_MANY).format(a=phrase), str(number)


def _most(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    extreme = rng.choice((max, min))
    numbers = [len(scene.things) for scene in scenes]
    best = extreme(numbers)
    return (rng.choice(_MOST[extreme]), str(numbers.index(best) + 1)) if numbers.count(best) == 1 else None


def _presence(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    number, yes = rng.randrange(len(scenes)) + 1, rng.random() < 0.5
    holders = _holders(scenes)
    if yes or rng.random() < 0.7:  # "no": mostly of a thing that another picture shows
        named = [one for one, held in holders.items() if (number in held) == yes]
        chosen = rng.choice(named) if named else None
    else:
        chosen = _absent(scenes, rng)
    if chosen is None:
        return None
    return rng.choice(_PRESENCE).format(a=_thing_phrase(chosen, rng), n=number), "yes" if yes else "no"


def _detail(scenes: Sequence[Scene], rng: random.Random) -> Draw:
    number = rng.randrange(len(scenes)) + 1
    asked = ask(scenes[number - 1], rng, 1, (rng.choice(DETAIL_KINDS),))
    return (_about(number, asked[0], rng), asked[0].answer) if asked else None


def _about(number: int, question: Question, rng: random.Random) -> str:
    """The words of a question about one picture, so that they name the picture."""
    text = question.text
    for words in ("the picture", "the image"):
        if words in text:
            return text.replace(words, f"picture {number}")
    if "," in text or rng.random() < 0.2:
        return f"Look at picture {number}. {text}"
    of = question.kind == "place" or text.endswith(("field?", "background?"))
    return f"{text[:-1]} {rng.choice(('of', 'in')) if of else 'in'} picture {number}{text[-1]}"


_ASK: dict[str, Callable[[Sequence[Scene], random.Random], Draw]] = {
    "which": _which,
    "how many": _how_many,
    "field": _field,
    "most": _most,
    "presence": _presence,
    "detail": _detail,
}


def _list_of(
    holders: dict, absent: Callable, wordings: Sequence[str], rng: random.Random, phrase: Callable | None = None
) -> Draw:
    named = absent() if rng.random() < NONE_SHARE else _with_drawn_number(holders, rng)
    if named is None:
        return None
    numbers = [str(number) for number in holders.get(named, ())]
    return rng.choice(wordings).format(a=(phrase or _thing_phrase)(named, rng)), join(numbers) if numbers else NONE


def _with_drawn_number(holders: dict, rng: random.Random):
    """One of the named; first the number of pictures that hold it is drawn, since most are held by a single one."""
    numbers = sorted({len(held) for held in holders.values()})
    [number] = rng.choices(numbers, weights=numbers)
    return rng.choice([named for named, held in holders.items() if len(held) == number])


def _holders(scenes: Sequence[Scene]) -> dict[_Kind, list[int]]:
    """The numbers of the pictures that show a thing, by its kind, and of shapes by kind and colour as well."""
    holders: dict[_Kind, list[int]] = {}
    for number, scene in enumerate(scenes, 1):
        named = {(thing.kind, None): None for thing in scene.things}
        named |= {(thing.kind, thing.colour): None for thing in scene.things}  # a dict, since a set has no fixed order
        for one in named:
            holders.setdefault(one, []).append(number)
    return holders


def _fields(scenes: Sequence[Scene]) -> dict[str, list[int]]:
    fields: dict[str, list[int]] = {}
    for number, scene in enumerate(scenes, 1):
        fields.setdefault(scene.background, []).append(number)
    return fields


def _absent(scenes: Sequence[Scene], rng: random.Random) -> _Kind | None:
    """A thing that no picture shows, drawn as things are; a shape that is there may be named in another colour."""
    holders = _holders(scenes)
    for _ in range(20):
        kind = draw_kind(rng, scenes[0].shapes_only)
        named = (kind, rng.choice(tuple(COLOURS)) if kind in SHAPES and rng.random() < 0.5 else None)
        if named not in holders:
            return named
    return None


def _absent_field(scenes: Sequence[Scene], rng: random.Random) -> str | None:
    """A colour that no field has."""
    left = [colour for colour in BACKGROUNDS if colour not in _fields(scenes)]
    return rng.choice(left) if left else None


def _thing_phrase(named: _Kind, rng: random.Random) -> str:
    kind, colour = named
    return with_article(f"{colour} {kind}" if colour else noun(kind, rng))


def _field_phrase(colour: str, rng: random.Random) -> str:
    return with_article(f"{colour} {rng.choice(('field', 'field', 'background'))}")
