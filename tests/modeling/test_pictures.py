"""`load_image`: what is taken for a picture, and what is refused."""

import functools
import http.server
import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fwd2bot.pictures_fwd2bot import MAX_IMAGE_PIXELS, load_image


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


RED = Image.new("RGB", (3, 2), (200, 10, 30))


# One picture, however it comes


def upside_down() -> tuple[bytes, np.ndarray]:
    """A JPEG that says "rotate me by 180 degrees": its top is black when it is shown."""
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(picture, "JPEG", exif=exif, quality=100), np.asarray(picture.rotate(180)).astype(int)


def half_transparent() -> tuple[bytes, np.ndarray]:
    """Black at half strength on the left, fully transparent red on the right; laid on white."""
    picture = Image.new("RGBA", (2, 1))
    picture.putpixel((0, 0), (0, 0, 0, 128))
    picture.putpixel((1, 0), (255, 0, 0, 0))
    return encoded(picture), np.array([[[127] * 3, [255] * 3]])


def palette(**options) -> bytes:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putdata([0, 1])
    return encoded(picture, **options)


def grey_alpha() -> bytes:
    picture = Image.new("LA", (2, 1))
    picture.putdata([(40, 255), (40, 0)])
    return encoded(picture)


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16)))


def animation() -> bytes:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


CMYK = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
GREYS = np.array([[[0] * 3, [0x80] * 3, [0xFF] * 3]])
FORMATS = {
    "exif": upside_down(),
    "alpha": half_transparent(),
    "palette": (palette(), np.array([[[10, 20, 30], [200, 100, 0]]])),
    "palette with a transparent colour": (palette(transparency=1), np.array([[[10, 20, 30], [255] * 3]])),
    "palette with alpha": (palette(transparency=bytes([255, 0])), np.array([[[10, 20, 30], [255] * 3]])),
    "greyscale": (encoded(Image.new("L", (2, 1), 77)), np.full((1, 2, 3), 77)),
    "greyscale with alpha": (grey_alpha(), np.array([[[40] * 3, [255] * 3]])),
    "greyscale with a transparent value": (
        encoded(Image.new("L", (1, 1), 77), transparency=77),
        np.full((1, 1, 3), 255),
    ),
    "one bit": (encoded(Image.new("1", (2, 1), 1)), np.full((1, 2, 3), 255)),
    "16 bit PNG": (sixteen_bit(), GREYS),
    "16 bit TIFF": (encoded(Image.open(io.BytesIO(sixteen_bit())), "TIFF"), GREYS),
    "CMYK": (CMYK, np.tile([255, 0, 0], (8, 8, 1))),
    "animated GIF": (animation(), np.tile([255, 0, 0], (2, 2, 1))),
    "WebP": (encoded(RED, "WEBP", lossless=True), pixels(RED)),
    "BMP": (encoded(RED, "BMP"), pixels(RED)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["path", "string path", "bytes", "bytearray", "PIL"])
def test_picture_is_the_same_from_path_bytes_and_pil(tmp_path, name, kind):
    data, expected = FORMATS[name]
    path = tmp_path / "picture"
    path.write_bytes(data)
    source = {
        "path": path,
        "string path": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "PIL": Image.open(io.BytesIO(data)),
    }[kind]
    tolerance = 2 if name in ("exif", "CMYK") else 0  # JPEG
    assert np.abs(pixels(load_image(source)) - expected).max() <= tolerance


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3), (2, 3, 4)])
def test_array_is_a_picture(shape):
    array = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
    array[..., 3:] = 255
    expected = array[..., None].repeat(3, -1) if array.ndim == 2 else array[..., :3]
    assert (pixels(load_image(array)) == expected).all()


def test_pil_picture_is_left_as_it_was():
    data, _ = FORMATS["exif"]
    picture = Image.open(io.BytesIO(data))
    load_image(picture)
    load_image(picture)
    assert picture.getexif()[0x0112] == 3
    picture.load()


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_files_are_closed(tmp_path):
    path = tmp_path / "animation.gif"
    path.write_bytes(animation())
    for _ in range(3):
        load_image(path)


def test_url_gives_the_same_picture(tmp_path):
    data, expected = FORMATS["alpha"]
    (tmp_path / "alpha.png").write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = pixels(load_image(f"{address}/alpha.png"))
        with pytest.raises(ValueError, match=r"missing.png' could not be fetched: .*404.*Check the address"):
            load_image(f"{address}/missing.png")
        server.shutdown()
    assert (found == expected).all()


# Pictures that cannot be used


def test_truncated_picture_is_named(tmp_path):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "GIF"):
        data = encoded(noise, kind)
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"Image '.*cut.{kind.lower()}' cannot be read.*incomplete"):
            load_image(path)
        with pytest.raises(ValueError, match=r"An image \(bytes\) cannot be read"):
            load_image(path.read_bytes())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_raise_nothing_but_value_errors():
    random = np.random.RandomState(0)
    for data, _ in FORMATS.values():
        for _ in range(30):
            damaged = bytearray(data)
            for place in random.randint(0, len(damaged), 3):
                damaged[place] = random.randint(256)
            try:
                load_image(bytes(damaged))
            except ValueError as error:
                assert str(error).startswith("An image (bytes) ")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_enormous_picture_is_refused_before_it_is_decoded(monkeypatch):
    with pytest.raises(ValueError, match=r"too many pixels.*400000000.*allowed are 1 to 89,478,485.*Resize it"):
        load_image(bomb(20_000, 20_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a caller who switched Pillow's own check off
    with pytest.raises(ValueError, match=r"has 20000 x 20000 pixels; allowed are 1 to 89,478,485 in all"):
        load_image(bomb(20_000, 20_000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_a_little_too_large_is_refused():
    assert MAX_IMAGE_PIXELS < 10_000 * 9_000
    with pytest.raises(ValueError, match=r"has 10000 x 9000 pixels"):
        load_image(bomb(10_000, 9_000))


def test_what_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(ValueError, match="notes.txt' is no picture in a format that Pillow"):
        load_image(path)
    with pytest.raises(ValueError, match=r"An image \(bytes\) is no picture"):
        load_image(b"")


def test_folder_is_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder. Give the pictures in it"):
        load_image(tmp_path)


@pytest.mark.parametrize("name", ["missing.png", "x" * 5000])
def test_missing_path_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist or is no file"):
        load_image(str(tmp_path / name))


@pytest.mark.parametrize("value", [3, None, {"path": "x"}, torch.zeros(3, 4, 4), iter([RED])])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match=f"must be a path, a URL, bytes.*got {type(value).__name__}"):
        load_image(value)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), dtype=np.float32), np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros((3, 4, 5), np.uint8)],
)
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(ValueError, match=r"uint8 of shape \(height, width\).*got "):
        load_image(array)


def test_picture_with_nan_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        load_image(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))
