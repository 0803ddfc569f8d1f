"""Draw scenes: emoji from the Noto Color Emoji font, shapes with PIL."""

import math
import os
import random
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scene import Scene, Thing
from .things import BACKGROUNDS, COLOURS, EMOJI, PICTURE, SHAPES

FONT_VARIABLE = "FWD2BOT_EMOJI_FONT"
_FONT_NAME = "NotoColorEmoji.ttf"
_FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "/usr/share/fonts/google-noto-emoji",
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
)
_STRIKE = 109  # the only size of the font's bitmaps
_FINE = 8  # shapes are drawn this many times larger, then reduced
_RIM = 1.25  # pixels
_TEXTURES = 16  # variants of each field


def render(scene: Scene) -> Image.Image:
    """Draw a scene: an RGB picture of 96x96 pixels, the same one every time.

    Raises FileNotFoundError when it holds emoji and the font is missing; shapes need none.
    """
    picture = _field(scene.background, scene.index % _TEXTURES).copy()
    for thing in scene.things:
        sprite = _sprite(thing)
        picture.paste(sprite, (thing.x - sprite.width // 2, thing.y - sprite.height // 2), sprite)
    return picture


def has_font() -> bool:
    """Whether the emoji font is on this machine."""
    return _font_path() is not None


def _font_path() -> Path | None:
    if FONT_VARIABLE in os.environ:
        candidates = [Path(os.environ[FONT_VARIABLE])]
    else:
        candidates = [Path(folder).expanduser() / _FONT_NAME for folder in _FONT_FOLDERS]
    return next((path for path in candidates if path.is_file()), None)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = _font_path()
    if path is None:
        where = os.environ.get(FONT_VARIABLE) or ", ".join(_FONT_FOLDERS)
        raise FileNotFoundError(
            f"{_FONT_NAME} not found in {where}; install it with `apt-get install fonts-noto-color-emoji`, "
            f"or name the file in the environment variable {FONT_VARIABLE}"
        )
    return ImageFont.truetype(str(path), _STRIKE)


def _sprite(thing: Thing) -> Image.Image:
    if thing.kind in SHAPES:
        return _shape(thing.kind, COLOURS[thing.colour], thing.pixels)
    return _emoji(thing.kind, thing.pixels, thing.mirrored)


@cache
def _glyph(kind: str) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((0, 0), EMOJI[kind], font=_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


@cache
def _emoji(kind: str, pixels: int, mirrored: bool) -> Image.Image:
    glyph = _glyph(kind)
    scale = pixels / max(glyph.size)
    sprite = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sprite


@cache
def _shape(kind: str, colour: tuple[int, int, int], pixels: int) -> Image.Image:
    """A shape with a darker rim (a lighter one for black), so that two of one colour that overlap stay two."""
    dark = sum(colour) < 100
    rim = (105, 105, 110) if dark else tuple(round(0.7 * channel) for channel in colour)
    sprite = Image.new("RGB", (pixels, pixels), rim)
    sprite.paste(Image.new("RGB", (pixels, pixels), colour), mask=_mask(kind, pixels, _RIM))
    sprite.putalpha(_mask(kind, pixels, 0))
    return sprite


def _mask(kind: str, pixels: int, rim: float) -> Image.Image:
    """The shape as coverage 0..255, without a rim of so many pixels along its edge."""
    side = pixels * _FINE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    style = {"fill": 255, "outline": 0, "width": round(rim * _FINE)} if rim else {"fill": 255}
    if kind == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), **style)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _outline(kind)], **style)
    return mask.resize((pixels, pixels), Image.Resampling.BOX)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square, y downwards."""
    if kind == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if kind == "triangle":
        return [(0.5, 0.04), (1, 0.94), (0, 0.94)]
    if kind == "diamond":
        return [(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)]
    if kind == "star":
        radii = [(0.53, 0.22)[i % 2] for i in range(10)]
        return [
            (0.5 + r * math.sin(math.pi * i / 5), 0.53 - r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)
        ]
    # the heart curve of Weisstein, "Heart Curve" (MathWorld), eq. 7 and 8
    angles = [2 * math.pi * i / 90 for i in range(90)]
    heart = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in angles
    ]
    return [(0.5 + x / 33, 0.46 - y / 33) for x, y in heart]


@cache
def _field(background: str, texture: int) -> Image.Image:
    """The field in its colour, with a soft gradient in one of 16 directions and a few darker specks."""
    angle = 2 * math.pi * texture / _TEXTURES
    axis = np.linspace(-1, 1, PICTURE)
    gradient = 7 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])  # (96, 96)
    rng = random.Random(texture)
    specks = np.array([8 * (rng.random() < 0.04) for _ in range(PICTURE**2)]).reshape(PICTURE, PICTURE)
    pixels = np.array(BACKGROUNDS[background])[None, None] + (gradient - specks)[..., None]  # (96, 96, 3)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
