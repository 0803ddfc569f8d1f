"""What a caption says of a picture, as numbers, so that its truth is exact and quick to find.

A thing with its field is one integer (`Scene.codes`); a condition on a thing is a mask and a value. A claim is a list
of conditions, each with how many things may meet it, and at most one relation between the things of two conditions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from .scene import (
    CELL_SHIFT,
    COLOUR_CODES,
    COLOUR_SHIFT,
    FIELD_CODES,
    FIELD_SHIFT,
    KIND_CODES,
    KIND_SHIFT,
    PRESENT,
    SIZE_CODES,
    SIZE_SHIFT,
    Scene,
    draw_scene,
)
from .things import GRID

ANY = 9  # more things than a picture holds
SAMPLE_SIZE = 2000
_MOST_THINGS = 6


@dataclass(frozen=True)
class Condition:
    """Between `least` and `most` things have a code with `code & mask == value`."""

    mask: int
    value: int
    least: int = 1
    most: int = ANY


@dataclass(frozen=True)
class Claim:
    """All `conditions` hold. `relation` "left" or "above": some thing of the first condition lies in a column further
    left, or in a row further up, than some thing of the second."""

    conditions: tuple[Condition, ...]
    relation: str | None = None

    def is_true_of(self, scene: Scene) -> bool:
        codes = scene.codes
        for condition in self.conditions:
            mask, value, count = condition.mask, condition.value, 0
            for code in codes:
                if code & mask == value:
                    count += 1
            if not condition.least <= count <= condition.most:
                return False
        if self.relation is None:
            return True
        first, second = (
            [_along(self.relation, code >> CELL_SHIFT & 15) for code in codes if code & c.mask == c.value]
            for c in self.conditions[:2]
        )
        return min(first) < max(second)


class HasClaim(Protocol):
    claim: Claim


def condition(
    kind: str | None = None,
    colour: str | None = None,
    size: str | None = None,
    cell: int | None = None,
    field: str | None = None,
    least: int = 1,
    most: int = ANY,
) -> Condition:
    """A condition on what is named; None leaves it open."""
    mask, value = PRESENT, PRESENT
    if kind is not None:
        mask, value = mask | 127 << KIND_SHIFT, value | KIND_CODES[kind]
    if colour is not None:
        mask, value = mask | 15 << COLOUR_SHIFT, value | COLOUR_CODES[colour]
    if size is not None:
        mask, value = mask | 1 << SIZE_SHIFT, value | SIZE_CODES[size]
    if cell is not None:
        mask, value = mask | 15 << CELL_SHIFT, value | cell << CELL_SHIFT
    if field is not None:
        mask, value = mask | 7 << FIELD_SHIFT, value | FIELD_CODES[field]
    return Condition(mask, value, least, most)


def truth_table(captions: Sequence[HasClaim], scenes: Sequence[Scene]) -> np.ndarray:
    """Which caption is true of which scene: (N scenes, M captions) bool."""
    return claims_table([caption.claim for caption in captions], scene_codes(scenes))


def scene_codes(scenes: Sequence[Scene]) -> np.ndarray:
    """The codes of scenes as (N, 6) int32, 0 where there is no thing."""
    codes = np.zeros((len(scenes), _MOST_THINGS), np.int32)
    for row, scene in zip(codes, scenes, strict=True):
        row[: len(scene.codes)] = scene.codes
    return codes


def claims_table(claims: Sequence[Claim], codes: np.ndarray) -> np.ndarray:
    """Which claim is true of which row of `codes` (N, 6): (N, M) bool."""
    table = np.ones((len(codes), len(claims)), bool)
    if not claims:
        return table
    columns = np.array([m for m, claim in enumerate(claims) for _ in claim.conditions])
    flat = [c for claim in claims for c in claim.conditions]
    masks, values, least, most = (
        np.array([getattr(c, name) for c in flat], np.int32) for name in ("mask", "value", "least", "most")
    )
    counts = np.zeros((len(codes), len(flat)), np.int8)
    for thing in codes.T:  # (N,)
        counts += (thing[:, None] & masks) == values  # (N, C)
    holds = (counts >= least) & (counts <= most)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    table = np.logical_and.reduceat(holds, starts, axis=1)
    for m, claim in enumerate(claims):
        if claim.relation is not None:
            rows = np.flatnonzero(table[:, m])
            table[rows, m] = _relation_holds(claim, codes[rows])
    return table


def _relation_holds(claim: Claim, codes: np.ndarray) -> np.ndarray:
    where = _along(claim.relation, codes >> CELL_SHIFT & 15)  # (n, 6)
    first, second = ((codes & c.mask) == c.value for c in claim.conditions[:2])
    return np.where(first, where, GRID).min(1, initial=GRID) < np.where(second, where, -1).max(1, initial=-1)


def _along(relation: str, cell):
    return cell % GRID if relation == "left" else cell // GRID


def truth_rate(claim: Claim, shapes_only: bool = False) -> float:
    """The share of pictures that a claim is true of, from a fixed sample of 2,000 that belong to no split."""
    codes = _sample(shapes_only)  # (6, 2000)
    alive = None
    for c in claim.conditions:
        counts = ((codes & c.mask) == c.value).sum(0)
        holds = counts >= c.least
        if c.most < ANY:
            holds &= counts <= c.most
        alive = holds if alive is None else alive & holds
    if claim.relation is not None:
        rows = np.flatnonzero(alive)
        return float(_relation_holds(claim, codes.T[rows]).sum()) / SAMPLE_SIZE if len(rows) else 0.0
    return float(np.count_nonzero(alive)) / SAMPLE_SIZE


@lru_cache(maxsize=2)
def _sample(shapes_only: bool) -> np.ndarray:
    rng = random.Random(f"truth rate/{shapes_only}")
    scenes = [draw_scene(rng, "sample", i, shapes_only) for i in range(SAMPLE_SIZE)]
    return np.ascontiguousarray(scene_codes(scenes).T)
