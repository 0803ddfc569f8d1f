"""Files of visitors: what is taken, what is refused in which words, and what is left of a file."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from space_files import png, wide_png

from fwd2bot.space_app import uploads
from fwd2bot.space_app.uploads import Upload, VisitorError, arrived, decode, encode, shown_name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.jpg", b"just some words", "“notes.jpg” is no picture in one of the formats JPEG, .* Convert it"),
        ("empty.png", b"", "“empty.png” is empty. Choose another"),
        ("cut.png", png(Image.new("RGB", (300, 300), "red"))[:-80], "“cut.png” cannot be read.*replace it"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture in one of"),
        ("bomb.png", wide_png, "^“bomb.png” has far too many pixels; allowed are 1 to 24,000,000 in all. Resize it"),
        (
            "wide.png",
            lambda: wide_png(20_000, 2_000),
            "^“wide.png” has 20000 x 2000 pixels; allowed are 1 to 24,000,000",
        ),
    ],
)
def test_bad_file_is_refused_with_its_name_and_the_remedy(name, content, words):
    with pytest.raises(VisitorError, match=words):
        decode(Upload(name, content() if callable(content) else content))


def test_file_of_too_many_bytes_is_refused(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 100)
    with pytest.raises(VisitorError, match="“large.png” has 0.0 MB; at most 0 MB are taken"):
        decode(Upload("large.png", png(Image.new("RGB", (64, 64), "red")) * 2))


def test_file_that_is_too_large_is_not_read_into_memory(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(240 * uploads.MEGABYTE)
    monkeypatch.setattr(Path, "read_bytes", None)
    with arrived(str(path)) as [found]:
        with pytest.raises(VisitorError, match="“large.png” has 240.0 MB; at most 10 MB are taken. Make it smaller"):
            decode(found)
        assert not path.exists()


def test_what_the_page_refused_is_told_for_each_file():
    large = [["a.png", 11 * uploads.MEGABYTE], ["../b.png", 30 * uploads.MEGABYTE], ["small.png", 5]]
    one, other = uploads.refusals({"count": 0, "large": large})
    assert one.startswith("“a.png” has 11.0 MB; at most 10 MB") and other.startswith("“b.png” has 30.0 MB")
    assert uploads.refusals({"count": 25, "large": []}) == [
        "25 files came at once; at most 24 are taken. Choose fewer."
    ]


def test_large_picture_is_made_smaller():
    assert decode(Upload("a.png", png(Image.new("RGB", (3000, 1500), "red")))).size == (1024, 512)


def test_encoding_keeps_the_pixels_and_nothing_of_the_file():
    file = BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.new("RGB", (40, 30), (200, 30, 90)).save(file, "JPEG", exif=exif, comment=b"secret")
    content = encode(decode(Upload("a.jpg", file.getvalue())))
    assert b"where I live" not in content and b"secret" not in content
    with Image.open(BytesIO(content)) as again:
        assert again.size == (40, 30) and not again.getexif()
        assert all(abs(found - meant) < 4 for found, meant in zip(again.getpixel((5, 5)), (200, 30, 90), strict=True))


def test_files_are_read_one_by_one_and_deleted_also_when_they_are_too_many(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(500)]
    for path in paths:
        path.write_bytes(b"x")
    with arrived([str(path) for path in paths[:3]]) as found:
        assert [one.name for one in found] == ["0.png", "1.png", "2.png"]
        assert found[0].read() == b"x"
        assert [path.exists() for path in paths[:3]] == [False, True, True]
    assert not any(path.exists() for path in paths[:3])
    with pytest.raises(VisitorError, match="497 files came at once; at most 24"), arrived(list(map(str, paths[3:]))):
        pass
    assert list(tmp_path.iterdir()) == []


def test_name_is_shown_without_folders_and_control_characters():
    assert shown_name("C:\\me\\../a\x1b[31m\u202eb.png") == "a[31mb.png"
    assert len(shown_name("x" * 300 + ".png")) == 40


def test_file_that_is_gone_is_told_and_the_others_are_read(tmp_path):
    (tmp_path / "here.png").write_bytes(b"x")
    with arrived([str(tmp_path / "gone.png"), str(tmp_path / "here.png")]) as [gone, here]:
        with pytest.raises(VisitorError, match="“gone.png” is no longer here, choose it again"):
            gone.read()
        assert here.read() == b"x"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "found",
    [None, 3, [], {}, {"count": "x", "large": 5}, {"count": float("inf"), "large": [1, ["a"], ["a", "b"], [1, 2]]}],
)
def test_what_no_page_would_say_of_refused_files_is_passed_over(found):
    assert uploads.refusals(found) == []


def test_no_more_refused_files_are_told_than_may_come_at_once():
    assert len(uploads.refusals({"count": 0, "large": [["a.png", 10**400]] * 500})) == uploads.MAX_FILES
