"""Hard negatives: captions made false by one small change, of the sorts of SugarCrepe (Hsieh et al., 2023)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .captions import Caption, Phrase, draw_caption, draw_style, draw_synonym, inconsistent, specific
from .scene import Scene, Thing, draw_kind
from .things import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

HARD_NEGATIVE_SORTS = (
    "replace_object",
    "replace_attribute",
    "swap_object",
    "swap_attribute",
    "add_object",
    "add_attribute",
)
_TRIES = 12


def hard_negatives(
    scene: Scene, rng: random.Random, sorts: Sequence[str] = HARD_NEGATIVE_SORTS
) -> dict[str, tuple[Caption, str]]:
    """Captions of a picture, each with a false one that differs in one point.

    Returns sort -> (true caption, false text); a sort that the scene does not allow is left out.
    Raises ValueError for a sort that is not in HARD_NEGATIVE_SORTS.
    """
    pairs = {}
    for sort in sorts:
        if sort not in _EDITS:
            raise ValueError(f"unknown sort of hard negative {sort!r}; choose from {', '.join(HARD_NEGATIVE_SORTS)}")
        pair = _pair(scene, rng, _EDITS[sort])
        if pair is not None:
            pairs[sort] = pair[0], pair[1].text
    return pairs


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one detail changed, so that its description is false of the picture: the field, or one thing's
    kind, colour, size or cell, or two things that have changed cells. It is for texts: `x` and `y` stay."""
    changes = [replace(scene, background=_other(list(BACKGROUNDS), scene.background, rng))]
    i = rng.randrange(len(scene.things))
    thing = scene.things[i]
    changes.append(_with_thing(scene, i, kind=_other_kind(thing.kind, scene, rng)))
    changes.append(_with_thing(scene, i, size=_other(list(SIZES), thing.size, rng)))
    if thing.colour is not None:
        changes.append(_with_thing(scene, i, colour=_other(list(COLOURS), thing.colour, rng)))
    free = [cell for cell in range(len(PLACES)) if cell not in scene.cells]
    changes.append(_with_thing(scene, i, cell=rng.choice(free)))
    unlike = [j for j, other in enumerate(scene.things) if _looks(other) != _looks(thing)]
    if unlike:
        j = rng.choice(unlike)
        moved = _with_thing(scene, i, cell=scene.things[j].cell)
        changes.append(_with_thing(moved, j, cell=thing.cell))
    return rng.choice(changes)


def _looks(thing: Thing) -> tuple[str, str | None, str]:
    return thing.kind, thing.colour, thing.size


def _with_thing(scene: Scene, i: int, **changes: Any) -> Scene:
    things = list(scene.things)
    things[i] = replace(things[i], **changes)
    return replace(scene, things=tuple(things))


_Edit = Callable[[Caption, Scene, random.Random], Caption | None]


def _pair(scene: Scene, rng: random.Random, edit: _Edit) -> tuple[Caption, Caption] | None:
    for _ in range(_TRIES):
        true = draw_caption(scene, rng)
        if true is None:
            continue
        false = edit(true, scene, rng)
        if false is None or inconsistent(false.phrases) or false.is_true_of(scene):
            continue
        if specific(true, scene):
            return true, false
    return None


def _with(caption: Caption, i: int, **changes) -> Caption:
    phrases = list(caption.phrases)
    phrases[i] = replace(phrases[i], **changes)
    return replace(caption, phrases=tuple(phrases))


def _other(options: list, value: str | int, rng: random.Random) -> str | int:
    return rng.choice([option for option in options if option != value])


def _other_kind(kind: str, scene: Scene, rng: random.Random) -> str:
    """Another kind of the same sort: a shape for a shape, since it keeps its colour."""
    while True:
        other = draw_kind(rng, kind in SHAPES)
        if other != kind and (other in SHAPES) == (kind in SHAPES):
            return other


def _colours(scene: Scene) -> list[str]:
    return [colour for colour in COLOURS if colour != scene.background]


def _replace_object(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    i = rng.randrange(len(caption.phrases))
    return _with(caption, i, kind=_other_kind(caption.phrases[i].kind, scene, rng))


def _replace_attribute(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    said = [(i, name) for i, p in enumerate(caption.phrases) for name in ("colour", "size", "cell") if _said(p, name)]
    if caption.field and rng.random() < 1 / (1 + len(said)):
        named = {phrase.colour for phrase in caption.phrases}  # no shape has the colour of its field
        return replace(caption, field=_other([f for f in BACKGROUNDS if f not in named], caption.field, rng))
    if not said:
        return None
    i, name = rng.choice(said)
    return _with(caption, i, **{name: _other(_values(name, scene), getattr(caption.phrases[i], name), rng)})


def _swap_object(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    if len(caption.phrases) < 2:
        return None
    a, b = (0, 1) if caption.relation else rng.sample(range(len(caption.phrases)), 2)
    first, second = caption.phrases[a], caption.phrases[b]
    swapped = _with(caption, a, kind=second.kind, colour=second.colour, synonym=second.synonym)
    return _with(swapped, b, kind=first.kind, colour=first.colour, synonym=first.synonym)


def _swap_attribute(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    pairs = [
        (i, j, name)
        for j, q in enumerate(caption.phrases)
        for i, p in enumerate(caption.phrases[:j])
        for name in ("colour", "size")
        if _said(p, name) and _said(q, name) and getattr(p, name) != getattr(q, name)
    ]
    if not pairs:
        return None
    i, j, name = rng.choice(pairs)
    first, second = getattr(caption.phrases[i], name), getattr(caption.phrases[j], name)
    return _with(_with(caption, i, **{name: second}), j, **{name: first})


def _add_object(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    if len(caption.phrases) > 2:
        return None
    model = rng.choice(caption.phrases)  # the added thing says as much as one that is there
    kind = draw_kind(rng, scene.shapes_only)
    colour = rng.choice(_colours(scene)) if kind in SHAPES and rng.random() < 0.75 else None
    cells = [cell for cell in range(len(PLACES)) if all(p.cell != cell for p in caption.phrases)]
    added = Phrase(
        kind,
        colour,
        rng.choice(tuple(SIZES)) if model.size else None,
        rng.choice(cells) if model.cell is not None else None,
        1,
        draw_synonym(rng),
        draw_style(rng),
    )
    phrases = list(caption.phrases)
    phrases.insert(len(phrases) if caption.relation else rng.randrange(len(phrases) + 1), added)
    if caption.total is not None and sum(phrase.number for phrase in phrases) >= caption.total:
        return None
    return replace(caption, phrases=tuple(phrases))


def _add_attribute(caption: Caption, scene: Scene, rng: random.Random) -> Caption | None:
    free = [
        (i, name)
        for i, p in enumerate(caption.phrases)
        for name in ("colour", "size", "cell")
        if getattr(p, name) is None
        and not (name == "colour" and p.kind not in SHAPES)
        and not (name == "cell" and (p.number > 1 or caption.relation))
    ]
    if not free:
        return None
    i, name = rng.choice(free)
    return _with(caption, i, **{name: rng.choice(_values(name, scene))})


def _said(phrase: Phrase, name: str) -> bool:
    return getattr(phrase, name) is not None


def _values(name: str, scene: Scene) -> list:
    return {"colour": _colours(scene), "size": list(SIZES), "cell": list(range(len(PLACES)))}[name]


_EDITS: dict[str, _Edit] = {
    "replace_object": _replace_object,
    "replace_attribute": _replace_attribute,
    "swap_object": _swap_object,
    "swap_attribute": _swap_attribute,
    "add_object": _add_object,
    "add_attribute": _add_attribute,
}
