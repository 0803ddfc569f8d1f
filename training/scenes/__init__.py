"""A drawn world to learn from: pictures of everyday things, and texts about them, all deterministic by seed.

`Scenes` and `ScenesConfig`, the data set, are loaded when they are first used, and the `datasets` library with them.
"""

from typing import Any

from .captions import Caption, short_caption
from .claims import truth_table
from .corpus import PROMPTS, corpus
from .descriptions import DESCRIBE, describe
from .drawing import has_font, render
from .negatives import HARD_NEGATIVE_SORTS, altered, hard_negatives
from .questions import QUESTION_KINDS, TRAINING_KINDS, Question, ask
from .scene import Scene, Thing, scene
from .several import SEVERAL_KINDS, ask_several, companions

__all__ = [
    "DESCRIBE",
    "HARD_NEGATIVE_SORTS",
    "PROMPTS",
    "QUESTION_KINDS",
    "SEVERAL_KINDS",
    "TRAINING_KINDS",
    "Caption",
    "Question",
    "Scene",
    "Scenes",
    "ScenesConfig",
    "Thing",
    "altered",
    "ask",
    "ask_several",
    "companions",
    "corpus",
    "describe",
    "hard_negatives",
    "has_font",
    "render",
    "scene",
    "short_caption",
    "truth_table",
]


def __getattr__(name: str) -> Any:
    if name in ("Scenes", "ScenesConfig"):
        from . import builder

        return getattr(builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
