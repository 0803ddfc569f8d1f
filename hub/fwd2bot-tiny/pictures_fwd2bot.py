"""Any picture as RGB, the same from a path, from bytes and from PIL."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, where it begins to warn of decompression bombs
MAX_DOWNLOAD = 100_000_000  # bytes of a picture behind a URL
URL_TIMEOUT = 30  # seconds


def load_image(
    image: Any,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    formats: Sequence[str] | None = None,
    name: str | None = None,
    copy: bool = True,
) -> Image.Image:
    """Any picture as RGB, the same from a path, from bytes and from PIL.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame.

    Args:
        image: a path, a URL (http, https), bytes, a `PIL.Image`, or a `(height, width[, 3 or 4])` uint8 array.
        max_pixels: a picture of more is refused before it is decoded.
        formats: names of the formats, as Pillow has them ("PNG", "JPEG"), of which a path, a URL or bytes may be; for
            pictures of strangers, since Pillow also reads formats that hold programs. Default: all.
        name: what errors call the picture. Default: its path, URL or type.
        copy: False gives a `PIL.Image` that needs no change back as it is, to change and close with the given one.

    Raises:
        TypeError: for another type. ValueError: for a picture that cannot be read to its end, or one of more than
            `max_pixels` pixels. FileNotFoundError: for a path that is not there.
    """
    if name is None:
        is_named = isinstance(image, (str, os.PathLike))
        name = f"Image {str(image)[:200]!r}" if is_named else f"An image ({type(image).__name__})"
    source = _picture_source(image, name)
    limits = f"allowed are 1 to {max_pixels:,} in all. Resize it first."
    try:
        # Only what is opened here is closed here.
        with (
            nullcontext(source) if isinstance(source, Image.Image) else Image.open(source, formats=formats) as picture
        ):
            width, height = picture.size
            if 1 <= width * height <= max_pixels:
                return _to_rgb(picture, copy or picture is not image)
    except UnidentifiedImageError as error:
        known = f"in a format that Pillow {Image.__version__} reads."
        if formats is not None:
            known = f"in one of the formats {', '.join(formats)}. Convert it, or choose another one."
        raise ValueError(f"{name} is no picture {known}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels ({error}); {limits}") from error
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise ValueError(f"{name} cannot be read: {error}. It is damaged or incomplete; replace it.") from error
    raise ValueError(f"{name} has {width} x {height} pixels; {limits}")


def _picture_source(image: Any, name: str) -> Any:
    """What `PIL.Image.open` takes, or the `PIL.Image` itself."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(
                "An image array must be uint8 of shape (height, width), (height, width, 3) or (height, width, 4), got "
                f"{image.dtype} {image.shape}."
            )
        return Image.fromarray(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return BytesIO(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        try:
            request = Request(image, headers={"User-Agent": "fwd2bot"})
            with urlopen(request, timeout=URL_TIMEOUT) as response:
                content = response.read(MAX_DOWNLOAD + 1)
            if len(content) > MAX_DOWNLOAD:
                raise ValueError(f"{name} has more than {MAX_DOWNLOAD:,} bytes. Download it and make it smaller.")
            return BytesIO(content)
        except (OSError, HTTPException) as error:
            raise ValueError(f"{name} could not be fetched: {error}. Check the address and the network.") from error
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(
            f"An image must be a path, a URL, bytes, a PIL.Image or a uint8 array, got {type(image).__name__}."
        )
    if os.path.isdir(image):
        raise FileNotFoundError(f"{name} is a folder. Give the pictures in it.")
    if not os.path.isfile(image):  # unlike Path.is_file, it takes a name of any length
        raise FileNotFoundError(f"{name} does not exist or is no file.")
    return image


def _to_rgb(picture: Image.Image, copy: bool) -> Image.Image:
    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # it copies the picture in any case
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
        picture = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB") if copy or picture.mode != "RGB" else picture
