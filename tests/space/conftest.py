"""A service on the checkpoint inside the package, which several tests use, and one on a tiny random model."""

import struct
import zlib
from io import BytesIO

import pytest
import tiny
from PIL import Image

from fwd2bot.pipelines.embedded import gallery
from fwd2bot.space_app.collection import Shipped
from fwd2bot.space_app.options import SpaceOptions, load_service
from fwd2bot.space_app.service import Service
from fwd2bot.space_app.uploads import Upload


@pytest.fixture(scope="session")
def service():
    """Shared by the session; each test takes visitors of its own."""
    return load_service(SpaceOptions(device="cpu"))


@pytest.fixture
def tiny_service(shared_fwd2bot, tiny_processor):
    return Service(shared_fwd2bot, tiny_processor, Shipped(gallery()[:6]))


@pytest.fixture
def visitor(request):
    """The name of a session that no other test has."""
    return request.node.nodeid


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
