"""What lies inside the package: the default checkpoint and the gallery."""

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

DEFAULT_MODEL = "fwd2bot-tiny"
GALLERY = Path(__file__).parent / "gallery"


@dataclass(frozen=True)
class Question:
    """A question about a picture of the gallery, of a kind of the drawn world, and its one answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class GalleryPicture:
    """A drawn scene of 96x96 pixels and what is true of it: a full description, short captions, answered questions."""

    path: Path
    description: str
    captions: tuple[str, ...]
    questions: tuple[Question, ...]

    @cached_property
    def image(self) -> Image.Image:
        with Image.open(self.path) as picture:
            return picture.convert("RGB")


def checkpoint_path() -> Path:
    """Where the default checkpoint lies, whether or not it is there."""
    return Path(str(files("fwd2bot.hub_models"))) / DEFAULT_MODEL


def default_checkpoint() -> Path:
    """The folder of the default checkpoint, for `from_pretrained` and `pipeline(model=…)`.

    Raises:
        FileNotFoundError: when the package was installed without it.
    """
    path = checkpoint_path()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"The default checkpoint is not in {path}. Install fwd2bot again from a complete wheel."
        )
    return path


def gallery() -> list[GalleryPicture]:
    """The pictures of the gallery, in order; none was used in training or evaluation.

    Raises:
        FileNotFoundError: when the package was installed without it.
    """
    return [
        GalleryPicture(
            path=GALLERY / entry["file"],
            description=entry["description"],
            captions=tuple(entry["captions"]),
            questions=tuple(Question(**question) for question in entry["questions"]),
        )
        for entry in _gallery_json()["pictures"]
    ]


def showcase() -> dict[str, Any]:
    """The queries and questions that the demo asks: `queries` with the files that each is true of, `questions`."""
    return _gallery_json()["showcase"]


def _gallery_json() -> dict[str, Any]:
    path = GALLERY / "gallery.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Install fwd2bot again from a complete wheel.")
    return json.loads(path.read_text(encoding="utf-8"))
