"""A scene: what is drawn where. Every scene follows from its split and index alone."""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

from .things import BACKGROUNDS, CELL, COLOURS, GRID, KINDS, PICTURE, PLACES, SHAPES, SIZES, SPLITS, THINGS

SHAPE_SHARE = 0.25  # of the kinds in a picture
REPEAT_SHARE = 0.44  # of the pictures with two or more things: 40% of all
_COUNT_WEIGHTS = (10, 18, 18, 18, 18, 18)  # 1 to 6 things

# A thing and its field as one integer, so that a condition on it is `code & mask == value` (see claims.py).
PRESENT = 1
KIND_SHIFT, COLOUR_SHIFT, SIZE_SHIFT, CELL_SHIFT, FIELD_SHIFT = 1, 8, 12, 13, 17
KIND_CODES = {kind: i << KIND_SHIFT for i, kind in enumerate(KINDS)}
COLOUR_CODES = {colour: (i + 1) << COLOUR_SHIFT for i, colour in enumerate(COLOURS)} | {None: 0}
SIZE_CODES = {size: i << SIZE_SHIFT for i, size in enumerate(SIZES)}
FIELD_CODES = {field: i << FIELD_SHIFT for i, field in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. `cell` counts the 3x3 cells row by row; `x` and `y` are its centre and `pixels` its
    longest side, in pixels; only shapes have a colour; emoji may be mirrored."""

    kind: str
    colour: str | None
    size: str
    cell: int
    x: int
    y: int
    pixels: int
    mirrored: bool

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """A picture in words: its field and its things, in the order in which they are drawn."""

    split: str
    index: int
    background: str
    things: tuple[Thing, ...]
    shapes_only: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            fields["things"] = tuple(Thing(**thing) for thing in fields["things"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"not a scene: {str(text)[:80]!r} ({error}); pass a string that Scene.to_json() returned"
            ) from error

    @cached_property
    def codes(self) -> tuple[int, ...]:
        """One integer per thing: kind, colour, size, cell and the field."""
        field = FIELD_CODES[self.background] | PRESENT
        return tuple(
            KIND_CODES[t.kind] | COLOUR_CODES[t.colour] | SIZE_CODES[t.size] | t.cell << CELL_SHIFT | field
            for t in self.things
        )

    @cached_property
    def cells(self) -> dict[int, Thing]:
        return {thing.cell: thing for thing in self.things}

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many things there are of each kind in the picture."""
        counts: dict[str, int] = {}
        for thing in self.things:
            counts[thing.kind] = counts.get(thing.kind, 0) + 1
        return counts


def scene(split: str, index: int, *, shapes_only: bool = False) -> Scene:
    """Draw the scene number `index` of a split, the same one every time.

    Splits are seeded by their names, so that no seed is shared; and since two seeds may draw the same scene, a hash of
    what is drawn says which split it belongs to, and others draw again. `shapes_only` leaves out emoji: no font is
    needed.
    Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not isinstance(index, int) or index < 0:
        raise ValueError(f"scene index is {index!r}; pass a whole number from 0 on")
    return numbered_scene(split, index, shapes_only)


@lru_cache(maxsize=2**15)  # 50 MB in each process; whoever looks for a certain thing asks for each again and again
def numbered_scene(split: str, index: int, shapes_only: bool) -> Scene:
    rng = random.Random(f"{split}/{index}")
    while True:
        drawn = draw_scene(rng, split, index, shapes_only)
        if _owner(drawn) == split:
            return drawn


def draw_scene(rng: random.Random, split: str, index: int, shapes_only: bool) -> Scene:
    """Draw a scene from a random generator; `split` and `index` are written into it."""
    background = rng.choice(tuple(BACKGROUNDS))
    count = rng.choices(range(1, 7), _COUNT_WEIGHTS)[0]
    things = []
    kinds = _draw_kinds(rng, count, shapes_only)
    colours = [colour for colour in COLOURS if colour != background]
    last_colours: dict[str, str] = {}
    for kind, cell in zip(kinds, rng.sample(range(GRID * GRID), count), strict=True):
        size = rng.choice(tuple(SIZES))
        pixels = rng.randint(*SIZES[size])
        colour = None
        if kind in SHAPES:
            repeated = last_colours.get(kind)
            colour = repeated if repeated and rng.random() < 0.4 else rng.choice(colours)
            last_colours[kind] = colour
        x = _inside(cell % GRID * CELL + CELL // 2 + rng.randint(-4, 4), pixels)
        y = _inside(cell // GRID * CELL + CELL // 2 + rng.randint(-4, 4), pixels)
        mirrored = rng.random() < 0.5 and colour is None
        things.append(Thing(kind, colour, size, cell, x, y, pixels, mirrored))
    things.sort(key=lambda thing: thing.size)  # large before small: nothing is hidden behind a larger thing
    return Scene(split, index, background, tuple(things), shapes_only)


def _owner(scene: Scene) -> str:
    """The split that may hold what is drawn: an eighth of all is validation's, an eighth test's, the rest train's."""
    words = " ".join(f"{code} {thing.x} {thing.y}" for code, thing in zip(scene.codes, scene.things, strict=True))
    return {0: "validation", 1: "test"}.get(hashlib.sha256(words.encode()).digest()[0] % 8, "train")


def _draw_kinds(rng: random.Random, count: int, shapes_only: bool) -> list[str]:
    repeat = rng.choice((2, 3)) if count > 1 and rng.random() < REPEAT_SHARE else 1
    repeat = min(repeat, count)
    kinds: list[str] = []
    while len(kinds) < count - repeat + 1:
        kind = draw_kind(rng, shapes_only)
        if kind not in kinds:
            kinds.append(kind)
    kinds += kinds[:1] * (repeat - 1)
    rng.shuffle(kinds)
    return kinds


def draw_kind(rng: random.Random, shapes_only: bool = False) -> str:
    """Draw one kind as often as pictures hold it."""
    return rng.choice(SHAPES if shapes_only or rng.random() < SHAPE_SHARE else THINGS)


def _inside(centre: int, pixels: int) -> int:
    half = (pixels + 1) // 2
    return max(half, min(PICTURE - half, centre))
