"""Rows of data sets, in the formats that lie around, as samples: pictures, messages, captions. Nothing is decoded."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..source_recipe import COLUMNS, EVALUATION_COLUMNS, OPTIONAL_COLUMNS, SourceRecipe

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # of the files in a WebDataset tar
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
MARK = "<image>"  # where a text shows an image

Sample = dict[str, Any]
"""`images` (a path or bytes each), `messages` or None, `captions`, `negatives`, `key`, `source`."""


class MalformedRowError(ValueError):
    """A row that is not what its format says; it is counted and left out."""


class RowReader:
    """Reads the rows of one source.

    Args:
        recipe: of the source.
        image_of: a reference as it stands in the data (a name, an id, bytes, a dict) to bytes or a path.
    """

    def __init__(self, recipe: SourceRecipe, image_of: Callable[[Any], bytes | str]):
        self.recipe, self.image_of = recipe, image_of
        self._read = {
            "llava": self._llava,
            "messages": self._messages,
            "captions": self._captions,
            "vqa": self._vqa,
            "sugarcrepe": self._captions,
            "winoground": self._winoground,
            "objects": self._objects,
        }

    def __call__(self, row: dict[str, Any], number: int) -> Sample:
        """One row as a sample.

        Raises:
            MalformedRowError: naming what is wrong with it.
        """
        row = flat(row)
        sample = {"messages": None, "captions": [], "negatives": []} | self._read[self.recipe.format](row)
        sample["images"] = [self.image_of(image) for image in sample["images"]]
        sample["source"], sample["key"] = self.recipe.name, self.key(row, number)
        return sample

    def about(self, row: dict[str, Any]) -> dict[str, Any]:
        """What an evaluation knows of a row beside its sample: `group` and `category` (a text or None each), and
        `answers`, all that were given to its question where a list stands in the data, else none."""
        row = flat(row)
        found: dict[str, Any] = {}
        for purpose in EVALUATION_COLUMNS:
            name = self.column(row, purpose)
            found[purpose] = None if name is None or row[name] is None else str(row[name])
        name = self.column(row, "answer") if self.recipe.format == "vqa" and self.recipe.answers == "vote" else None
        value = None if name is None else row[name]
        found["answers"] = _answers(value) if isinstance(value, (list, tuple)) else []
        return found

    def key(self, row: dict[str, Any], number: int) -> str:
        """What a row is called in logs: its id, or its number."""
        try:
            row = flat(row)
        except MalformedRowError:
            return f"row {number}"
        name = self.column(row, "id")
        return f"row {number}" if name is None or row.get(name) is None else str(row[name])

    def column(self, row: dict[str, Any], purpose: str) -> str | None:
        """The name of the column for a purpose in this row, None if it has none."""
        if purpose in self.recipe.columns:
            names = (self.recipe.columns[purpose],)
        else:
            names = COLUMNS[self.recipe.format].get(purpose, ())
        return next((name for name in names if name in row), None)

    def check(self, row: dict[str, Any]) -> None:
        """Raise ValueError unless a row has the columns that its format needs."""
        try:
            row = flat(row)
        except MalformedRowError as error:
            raise ValueError(f"data.sources[{self.recipe.name!r}], first row: {error}") from error
        optional = OPTIONAL_COLUMNS.get(self.recipe.format, ("id",))
        needed = [purpose for purpose in COLUMNS[self.recipe.format] if purpose not in optional]
        needed += [purpose for purpose in EVALUATION_COLUMNS if purpose in self.recipe.columns]
        if self.recipe.format in ("llava", "messages"):  # rows of words alone have no image
            needed.remove("image")
        if "image_id" in self.recipe.columns and "image" in needed:
            needed.remove("image")
            if self.recipe.columns["image_id"] not in row:
                raise self._missing("image_id", (self.recipe.columns["image_id"],), row)
        for purpose in needed:
            if self.column(row, purpose) is None:
                names = COLUMNS[self.recipe.format].get(purpose, ())
                raise self._missing(purpose, (self.recipe.columns.get(purpose, "") or " or ".join(names),), row)

    def _missing(self, purpose: str, names: tuple[str, ...], row: dict[str, Any]) -> ValueError:
        return ValueError(
            f"data.sources[{self.recipe.name!r}] has no column {' or '.join(names)} for {purpose}; it has "
            f"{', '.join(map(str, row))}. Name the right one in columns: {{{purpose}: ...}}"
        )

    def _images(self, row: dict[str, Any]) -> list[Any]:
        joined = self.recipe.columns.get("image_id")
        name = joined if joined in row else self.column(row, "image")
        value = None if name is None else row[name]
        values = value if isinstance(value, (list, tuple)) else [value]
        return [one for one in values if one is not None]

    def _one_image(self, row: dict[str, Any]) -> list[Any]:
        images = self._images(row)
        if len(images) != 1:
            raise MalformedRowError(f"it has {len(images)} images; a row of format {self.recipe.format} has one")
        return images

    def _value(self, row: dict[str, Any], purpose: str) -> Any:
        name = self.column(row, purpose)
        if name is None or row[name] is None:
            raise MalformedRowError(f"it has no {purpose}")
        return row[name]

    def _llava(self, row: dict[str, Any]) -> Sample:
        turns = self._value(row, "conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise MalformedRowError("conversations is no list of turns")
        messages = [{"role": turn.get("from"), "content": turn.get("value")} for turn in turns]
        images = self._images(row)
        return {"images": images, "messages": with_parts(messages, len(images))}

    def _messages(self, row: dict[str, Any]) -> Sample:
        messages = self._value(row, "messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise MalformedRowError("messages is no list of messages")
        images = self._images(row)
        images = images or [image for message in messages for image in images_within(message.get("content"))]
        return {"images": images, "messages": with_parts(messages, len(images))}

    def _captions(self, row: dict[str, Any]) -> Sample:
        texts = {}
        for purpose in ("captions", "negatives"):
            name = self.column(row, purpose)
            value = None if name is None else row[name]
            values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(text, str) for text in values):
                raise MalformedRowError(f"{purpose} holds something that is no text: {str(values)[:80]}")
            texts[purpose] = [text.strip() for text in values if text.strip()]
        if not texts["captions"]:
            raise MalformedRowError("it has no caption")
        return {"images": self._one_image(row), **texts}

    def _vqa(self, row: dict[str, Any]) -> Sample:
        question = self._value(row, "question")
        if not isinstance(question, str) or not question.strip():
            raise MalformedRowError(f"its question is {question!r}")
        answer = self._answer(self._value(row, "answer"))
        content = [{"type": "image"}, {"type": "text", "text": question.strip() + self.recipe.question_suffix}]
        told = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return {"images": self._one_image(row), "messages": [{"role": "user", "content": content}, told]}

    def _winoground(self, row: dict[str, Any]) -> Sample:
        images, captions = ([self._value(row, f"{what}_{i}") for i in (0, 1)] for what in ("image", "caption"))
        if not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise MalformedRowError(f"its captions are {str(captions)[:80]}")
        return {"images": images, "captions": captions}

    def _objects(self, row: dict[str, Any]) -> Sample:
        return {"images": self._one_image(row)}

    def objects(self, row: dict[str, Any]) -> list[str]:
        """The names of what is in the picture of a row of format objects, each once.

        Raises:
            MalformedRowError: they are no list of texts.
        """
        values = self._value(flat(row), "objects")
        if not isinstance(values, (list, tuple)) or not all(isinstance(name, str) for name in values):
            raise MalformedRowError(f"objects is no list of names: {str(values)[:80]}")
        return list(dict.fromkeys(name.strip().lower() for name in values if name.strip()))

    def _answer(self, value: Any) -> str:
        answers = _answers(value)
        if not answers:
            raise MalformedRowError("it has no answer")
        return ", ".join(answers) if self.recipe.answers == "join" else Counter(answers).most_common(1)[0][0]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its columns: a line of JSON parsed, a sample of a WebDataset tar with the picture as `image`."""
    if list(row) == ["text"]:
        try:
            row = json.loads(row["text"])
        except ValueError as error:
            raise MalformedRowError(f"the line is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise MalformedRowError(f"the line holds {type(row).__name__}, no object with columns")
    if "__key__" not in row:
        return row
    picture = next((name for name in row if name.lower() in PICTURE_ENDINGS and row[name] is not None), None)
    inner = row.get("json") if isinstance(row.get("json"), dict) else {}
    row = {name: value for name, value in row.items() if name not in ("json", "__url__")}
    return inner | row | ({} if picture is None else {"image": row[picture]})


def with_parts(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of image and text parts, with exactly so many images.

    `<image>` in a text shows one; images that no text or part shows stand before the first words of the user.
    """
    parted = [_message(message) for message in messages]
    shown = sum(part["type"] == "image" for message in parted for part in message["content"])
    if shown == 0 and num_images:
        user = next((message for message in parted if message["role"] == "user"), None)
        if user is None:
            raise MalformedRowError("it has images, but no turn of the user to show them in")
        user["content"] = [{"type": "image"}] * num_images + user["content"]
    elif shown != num_images:
        raise MalformedRowError(f"its texts show {shown} image(s), but it has {num_images}")
    if not any(message["role"] == "assistant" for message in parted):
        raise MalformedRowError("no turn of the assistant: there is nothing to learn")
    if any(p["type"] == "image" for m in parted if m["role"] == "assistant" for p in m["content"]):
        raise MalformedRowError("a turn of the assistant shows an image; a model that writes text cannot learn that")
    return parted


def images_within(content: Any) -> list[Any]:
    """The images that stand inside the content of a message, as chat templates take them."""
    found = []
    for part in content if isinstance(content, (list, tuple)) else []:
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            for name in ("image", "path", "url", "image_url"):
                image = part.get(name)
                if image is not None:
                    found.append(image.get("url") if name == "image_url" and isinstance(image, dict) else image)
                    break
    return found


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = ROLES.get(message.get("role")), message.get("content")
    if role is None:
        raise MalformedRowError(f"the role {message.get('role')!r} is none of {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": _split(content) if MARK in content else [_text(content)]}
    if not isinstance(content, (list, tuple)) or not content:
        raise MalformedRowError(f"a turn of the {role} holds {type(content).__name__}, no text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_text(part["text"]))
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
        else:
            raise MalformedRowError(f"a part of type {kind!r}; text and image parts can be learnt")
    return {"role": role, "content": parts}


def _split(text: str) -> list[dict[str, Any]]:
    """A text with marks as parts; the line break between a mark and the words is the template's business."""
    pieces = re.split(rf"\n?{re.escape(MARK)}\n?", text)
    parts = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index else []
        parts += [_text(piece)] if piece.strip() else []
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _answers(value: Any) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    answers = [_as_text(one.get("answer") if isinstance(one, dict) else one) for one in values]
    return [answer for answer in answers if answer]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value).strip()
