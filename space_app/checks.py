"""What a visitor or a program has sent, checked before any compute; each message says what goes instead."""

import unicodedata
from textwrap import shorten
from typing import Any

from .uploads import VisitorError

MAX_TEXT = 1000  # characters of a query or a question
MAX_ASKED = 5  # pictures of one question


def check_number(name: str, number: Any, low: int, high: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise VisitorError(f"{name} must be a whole number from {low} to {high}, not {number!r}.")


def check_ids(ids: Any) -> tuple[str, ...]:
    """The ids of pictures, each once."""
    if not isinstance(ids, (list, tuple)) or not all(isinstance(one, str) for one in ids):
        raise VisitorError(f'pictures must be a list of ids such as ["gallery-43"], not {shorten(repr(ids), 60)}.')
    if len(ids) > MAX_ASKED:
        raise VisitorError(f"{len(ids)} pictures are too many for one question; choose 1 to {MAX_ASKED}.")
    return tuple(dict.fromkeys(ids))


def check_text(text: Any, what: str, image_token: str, latin_only: bool) -> str:
    """A query or a question on one line.

    Args:
        what: its name in messages. image_token: what marks a picture in a prompt, and may not be in a text.
        latin_only: refuse a text in another script, as one that the checkpoint has never seen.
    """
    if text is not None and not isinstance(text, str):
        raise VisitorError(f"The {what} must be text, not {shorten(repr(text), 60)}.")
    if not text or not text.strip():
        raise VisitorError(f"The {what} is empty. Write at least one word.")
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    if len(text) > MAX_TEXT:
        raise VisitorError(f"The {what} has {len(text)} characters; at most {MAX_TEXT} are read. Shorten it.")
    letters = [one for one in text if one.isalpha()]
    latin = [one for one in letters if unicodedata.name(one, "").startswith("LATIN")]
    if latin_only and 2 * len(latin) < len(letters):
        example = "How many carrots are in the picture?" if what == "question" else "two snowmen on a blue field"
        raise VisitorError(
            f"This checkpoint has read simple English only, and nothing in the script of this {what}. Write it in "
            f"English, such as “{example}”, or start the Space with a checkpoint that knows your language."
        )
    if image_token in text:
        raise VisitorError(f"The {what} holds {image_token!r}, which marks a picture. Leave it out.")
    return text
