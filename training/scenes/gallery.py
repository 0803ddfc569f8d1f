"""Draw the gallery that lies in the package: `python -m fwd2bot.training.scenes.gallery [--output FOLDER]`.

Its pictures are test scenes of numbers that neither training nor evaluation reaches.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from .captions import Caption, short_caption
from .descriptions import describe
from .drawing import render
from .questions import ask
from .scene import Scene, scene

FIRST = 10_000_000
COUNT = 60
CAPTIONS = 3
QUESTIONS = 8
# What the demo asks: (picture, number of its caption) and (picture, kind of its question).
QUERIES = ((6, 1), (47, 2), (29, 1))
ASKED = ((43, "count"), (48, "neighbour"), (16, "colour"))
NOTE = (
    "Drawn by fwd2bot.training.scenes, part of fwd2bot, under Apache-2.0. The things are drawn with the font Noto "
    "Color Emoji, Copyright 2013-2017 Google Inc., under the SIL Open Font License 1.1 (https://openfontlicense.org), "
    "from drawings under Apache-2.0 (https://github.com/googlefonts/noto-emoji)."
)


def make_gallery(folder: Path) -> list[Path]:
    """Write the pictures and gallery.json into `folder`, and return their paths.

    gallery.json is written last and replaced at once; a picture that is there already is overwritten.

    Raises:
        FileNotFoundError: when the emoji font is missing. OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in zip(_names(), _scenes(), strict=True):
        render(one).save(folder / name, optimize=True)
    _write_json(folder / "gallery.json", gallery_content())
    return [folder / name for name in (*_names(), "gallery.json")]


def gallery_content() -> dict[str, Any]:
    """What gallery.json says: of each picture its texts, and what the demo asks."""
    names, scenes = _names(), _scenes()
    captions = [_captions(one) for one in scenes]
    pictures = []
    for name, one, ours in zip(names, scenes, captions, strict=True):
        rng = random.Random(f"gallery/{one.index}")
        pictures.append(
            {
                "file": name,
                "description": describe(one, rng),
                "captions": [caption.text for caption in ours],
                "questions": [
                    {"kind": question.kind, "text": question.text, "answer": question.answer}
                    for question in ask(one, rng, QUESTIONS)
                ],
            }
        )
    queries = [captions[picture][number] for picture, number in QUERIES]
    return {
        "note": NOTE,
        "pictures": pictures,
        "showcase": {
            "queries": [
                {
                    "text": query.text,
                    "files": [name for name, one in zip(names, scenes, strict=True) if query.is_true_of(one)],
                }
                for query in queries
            ],
            "questions": [
                {"file": names[picture], **next(q for q in pictures[picture]["questions"] if q["kind"] == kind)}
                for picture, kind in ASKED
            ],
        },
    }


def _names() -> list[str]:
    return [f"{index:02d}.png" for index in range(COUNT)]


def _scenes() -> list[Scene]:
    return [scene("test", FIRST + index) for index in range(COUNT)]


def _captions(one: Scene) -> list[Caption]:
    rng = random.Random(f"gallery/captions/{one.index}")
    captions: dict[str, Caption] = {}
    for _ in range(10 * CAPTIONS):
        caption = short_caption(one, rng)
        captions.setdefault(caption.text, caption)
        if len(captions) == CAPTIONS:
            break
    return list(captions.values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "pipelines" / "gallery"
    parser.add_argument("--output", type=Path, default=default, help="folder for the pictures (default: %(default)s)")
    output = parser.parse_args().output
    paths = make_gallery(output)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} files, {size / 1024:.0f} KiB, in {output}")


if __name__ == "__main__":
    main()
