"""Files as visitors bring them, good and bad."""

import struct
import zlib
from io import BytesIO

import tiny
from PIL import Image

from fwd2bot.space_app.uploads import Upload


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def upload(index: int = 0) -> Upload:
    return Upload(f"{index}.png", png(tiny.pictures(index + 1)[index]))


def wide_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A picture of one colour, small as a file and enormous when it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel, grey
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
