"""Pictures of visitors: limited, decoded with care, and encoded anew, so that nothing of the file itself is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fwd2bot.pictures_fwd2bot import load_image

MAX_FILES = 24  # at once, and of one visitor
MEGABYTE = 2**20  # as Gradio counts it where it shows the size of a file
MAX_FILE_BYTES = 10 * MEGABYTE
MAX_PIXELS = 24_000_000
MAX_SIDE = 1024  # pixels of what is kept
# Bitmaps only: Pillow also reads formats that hold programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class VisitorError(ValueError):
    """Something that the visitor can mend; the message says how and is shown in the page."""


@dataclass(frozen=True)
class Upload:
    """A file as it came: the name that the visitor gave it, and its content, or where on the disk that is."""

    name: str
    content: bytes = b""
    path: Path | None = None

    def read(self) -> bytes:
        """The content; a file on the disk is deleted with that, and not read where it is too large.

        Raises:
            VisitorError: for one that is empty, too large, or gone: read before, or left lying for too long.
        """
        name = shown_name(self.name)
        try:
            size = len(self.content) if self.path is None else self.path.stat().st_size
            check_size(name, size)
            if not size:
                raise VisitorError(f"“{name}” is empty. Choose another file.")
            return self.content if self.path is None else self.path.read_bytes()
        except FileNotFoundError as error:
            raise VisitorError(f"“{name}” is no longer here, choose it again.") from error
        finally:
            if self.path is not None:
                self.path.unlink(missing_ok=True)


@contextmanager
def arrived(paths: list[str] | str | None) -> Iterator[list[Upload]]:
    """The files that the web server has put on the disk, each read when it is its turn; none outlives the block.

    Raises:
        VisitorError: for too many.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str) else paths or [])]
    try:
        check_count(len(paths))
        yield [Upload(path.name, path=path) for path in paths]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def check_count(count: int) -> None:
    if count > MAX_FILES:
        raise VisitorError(f"{count} files came at once; at most {MAX_FILES} are taken. Choose fewer.")


def check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise VisitorError(
            f"“{shown_name(name)}” has {size / MEGABYTE:.1f} MB; at most {MAX_FILE_BYTES // MEGABYTE} MB are taken. "
            "Make it smaller first, for example by saving it as a JPEG or with fewer pixels."
        )


def refusals(found: Any) -> list[str]:
    """What there is to say of the files that the page itself has refused: their number, or name and size of each.

    Args:
        found: as the page sends it: `{"count": …, "large": [[name, size], …]}`.
    """
    found = found if isinstance(found, dict) else {}
    count, large = found.get("count"), found.get("large")
    checks = [(check_count, (count,))] if type(count) is int else []
    for one in large[:MAX_FILES] if isinstance(large, list) else []:  # the page may send anything
        if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and type(one[1]) is int:
            checks.append((check_size, (one[0], min(one[1], 2**53))))
    problems = []
    for check, arguments in checks:
        try:
            check(*arguments)
        except VisitorError as error:
            problems.append(str(error))
    return problems


def decode(upload: Upload) -> Image.Image:
    """The picture of a file as RGB, at most `MAX_SIDE` pixels high and wide.

    Raises:
        VisitorError: for a file that is gone, empty, too large, no picture, damaged, or of too many pixels.
    """
    name, content = shown_name(upload.name), upload.read()
    try:
        picture = load_image(content, max_pixels=MAX_PIXELS, formats=FORMATS)
    except ValueError as error:
        reason = str(error).removeprefix("An image (bytes) ")
        if isinstance(error.__cause__, Image.DecompressionBombError):  # whose words speak of Pillow's own limit
            reason = f"has far too many pixels; allowed are 1 to {MAX_PIXELS:,} in all. Resize it first."
        raise VisitorError(f"“{name}” {reason}") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def encode(picture: Image.Image, quality: int = 95) -> bytes:
    """A JPEG of the pixels alone: no metadata, no profile, nothing else of the file."""
    file = BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(
        file, "JPEG", quality=quality, subsampling=0 if quality >= 90 else -1
    )
    return file.getvalue()


def shown_name(name: str) -> str:
    """The name of a file as it is shown: without folders, without what does not print, not too long."""
    name = Path(name.replace("\\", "/")).name
    name = "".join(character for character in name if character.isprintable()).strip()
    return name if len(name) <= 40 else f"{name[:28]}…{name[-11:]}"
