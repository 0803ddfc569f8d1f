"""Pictures that were found, for the eye: a contact sheet (.png) or a page of its own (.html)."""

import base64
import html
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import typer

from .options import is_url
from .printing import printable, say

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".html")
MAX_SHOWN = 200  # pictures on one page
SIDE, MARGIN, LINE, COLUMNS = 200, 16, 18, 5  # pixels and pictures of a contact sheet
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 15px system-ui, sans-serif; margin: 2em; color: #222 }}
section {{ display: flex; flex-wrap: wrap; gap: 1.5em }}
figure {{ margin: 0; width: 220px }} figcaption {{ overflow-wrap: anywhere; color: #555; font-size: 13px }}
img, .missing {{ width: 220px; height: 220px; object-fit: contain; background: #f4f4f4 }}
.missing {{ display: grid; place-content: center; text-align: center; background: #ccc; overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1>
{sections}
</body></html>
"""
Section = tuple[str | None, list[dict[str, Any]]]  # a heading, and hits as `SummaryStore.search` returns them


def check_show_path(path: Path | None) -> None:
    """Raise `typer.BadParameter` for a file that `write_page` could not write, before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() not in ENDINGS:
        raise typer.BadParameter(f"{str(path)!r} must end in {' or '.join(ENDINGS)}.", param_hint="--show")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is no file in a folder that is there.", param_hint="--show")


def try_page(path: Path | None, title: str, sections: list[Section]) -> tuple[str | None, OSError | None]:
    """As `write_page`, and what went wrong: an error for when the hits themselves have been printed."""
    try:
        return None if path is None else write_page(path, title, sections), None
    except OSError as error:
        return None, error


def write_page(path: Path, title: str, sections: list[Section]) -> str:
    """Write hits with their pictures, as far as these can be reached, and return the path."""
    sections, left_out = _at_most(sections, MAX_SHOWN)
    make = contact_sheet if path.suffix.lower() == ".png" else html_page
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    content = make(title, sections)
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)
    say(f"Shown in {path}." + (f" {left_out:,} more pictures were left out." if left_out else ""))
    return str(path)


def contact_sheet(title: str, sections: list[Section]) -> bytes:
    """A PNG: the title, and below each heading its pictures with score and the name of their file, or their id."""
    from PIL import Image, ImageDraw, ImageFont

    font, large = ImageFont.load_default(13), ImageFont.load_default(18)
    columns = max(1, min(COLUMNS, max(len(hits) for _, hits in sections)))
    width = max(2 * SIDE, columns * (SIDE + MARGIN)) + MARGIN
    inside = width - 2 * MARGIN
    cell = SIDE + 3 * LINE
    lines = {text: _wrap(text, inside, large.getlength) for text in (title, *(one for one, _ in sections if one))}
    height = MARGIN + len(lines[title]) * 24 + MARGIN
    for heading, hits in sections:
        height += len(lines[heading]) * 24 + MARGIN if heading else 0
        height += -(-len(hits) // columns) * cell
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, top: int) -> int:
        for line in lines[text]:
            draw.text((MARGIN, top), line, "black", large)
            top += 24
        return top + MARGIN

    top = write(title, MARGIN)
    for heading, hits in sections:
        top = write(heading, top) if heading else top
        for index, hit in enumerate(hits):
            left, upper = MARGIN + index % columns * (SIDE + MARGIN), top + index // columns * cell
            picture = original(hit["source"], SIDE)
            if picture is None:
                draw.rectangle((left, upper, left + SIDE - 1, upper + SIDE - 1), fill=(204, 204, 204))
                text = "\n".join(_wrap(hit["id"], SIDE - MARGIN, font.getlength)[:8])
                draw.multiline_text((left + SIDE / 2, upper + SIDE / 2), text, "black", font, anchor="mm")
            else:
                sheet.paste(picture, (left + (SIDE - picture.width) // 2, upper + (SIDE - picture.height) // 2))
            name = os.path.basename(hit["source"] or "") or hit["id"]
            for number, text in enumerate((_score(hit), _wrap(name, SIDE, font.getlength)[0])):
                draw.text((left, upper + SIDE + 2 + number * LINE), text, "dimgrey", font)
        top += -(-len(hits) // columns) * cell
    file = BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def html_page(title: str, sections: list[Section]) -> bytes:
    """A page that holds its pictures itself; all text in it is escaped, and it loads and runs nothing."""
    parts = []
    for heading, hits in sections:
        figures = "\n".join(_figure(hit) for hit in hits)
        parts.append((f"<h2>{_text(heading)}</h2>\n" if heading else "") + f"<section>\n{figures}\n</section>")
    return PAGE.format(title=_text(title), sections="\n".join(parts)).encode()


def original(source: str | None, side: int, enlarge: bool = True) -> "Image | None":
    """The picture at an absolute path or URL, or in a row of a parquet file, made to fit into `side` pixels; None when
    it cannot be reached.

    Args:
        enlarge: whether one that is smaller is made larger.
    """
    from PIL import ImageOps

    from fwd2bot.pictures_fwd2bot import load_image
    from fwd2bot.pipelines.store.sources import Item, parquet_row, read

    # A relative name of a data set might be another picture here.
    if not source or not (os.path.isabs(source) or is_url(source)):
        return None
    try:
        item = read(parquet_row(source) or Item(source), load_image)
        if item.picture is None or not enlarge and max(item.picture.size) <= side:
            return item.picture
        return ImageOps.contain(item.picture, (side, side))
    except (OSError, ValueError):
        return None


def _at_most(sections: list[Section], count: int) -> tuple[list[Section], int]:
    """The sections up to so many pictures, and how many are left out."""
    kept, total = [], 0
    for heading, hits in sections:
        if total < count:
            kept.append((heading, hits[: count - total]))
        total += len(hits)
    return kept, max(0, total - count)


def _figure(hit: dict[str, Any]) -> str:
    picture = original(hit["source"], 440)
    if picture is None:
        shown = f'<div class="missing">{_text(hit["id"])}</div>'
    else:
        file = BytesIO()
        picture.save(file, "JPEG", quality=85)
        shown = (
            f'<img alt="{_text(hit["id"])}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
        )
    values = [f"{name}: {value}" for name, value in hit["metadata"].items() if value is not None]
    lines = [line for line in (_score(hit), hit["id"], hit["source"], *values) if line]
    return f"<figure>{shown}<figcaption>{'<br>'.join(map(_text, lines))}</figcaption></figure>"


def _score(hit: dict[str, Any]) -> str:
    return "" if hit["score"] is None else f"{hit['score']:.3f}"


def _text(value: str) -> str:
    return html.escape(printable(value))


def _wrap(text: str, width: float, length: Callable[[str], float]) -> Sequence[str]:
    """Lines that are no wider than `width`; a word that is, such as an id, is broken."""
    lines = [""]
    for word in printable(text).split():
        if lines[-1] and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and length(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
