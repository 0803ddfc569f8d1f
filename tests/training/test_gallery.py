"""The gallery in the package is what its script draws."""

import json

import pytest

from fwd2bot.pipelines import embedded
from fwd2bot.training.scenes import has_font
from fwd2bot.training.scenes.gallery import gallery_content, make_gallery


def test_texts_of_the_gallery_are_what_the_script_writes():
    committed = json.loads((embedded.GALLERY / "gallery.json").read_text(encoding="utf-8"))
    assert committed == gallery_content(), "run python -m fwd2bot.training.scenes.gallery"


@pytest.mark.skipif(not has_font(), reason="the emoji font is not installed")
def test_script_writes_every_file_of_the_gallery(tmp_path):
    paths = make_gallery(tmp_path / "gallery")
    assert {path.name for path in paths} == {path.name for path in embedded.GALLERY.iterdir()}
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {path.name for path in paths}
