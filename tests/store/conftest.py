"""A store of the tiny model, and pictures as files."""

import pytest
import tiny

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.compressor import Compressor


@pytest.fixture
def new_store(shared_fwd2bot, tiny_processor, tmp_path):
    """`new_store(name, **options)` makes an empty one."""

    def make(name="store", **options):
        return SummaryStore.create(tmp_path / name, shared_fwd2bot, tiny_processor, **{"codec": "fp16", **options})

    return make


@pytest.fixture
def store(new_store):
    return new_store()


@pytest.fixture
def save_pictures(tmp_path):
    """`save_pictures(count, seed)` draws so many into a folder, and returns it and the paths."""

    def save(count, seed=0, folder="pictures"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        paths = [place / f"{seed}-{index:03}.png" for index in range(count)]
        for path, picture in zip(paths, tiny.pictures(count, seed), strict=True):
            picture.save(path)
        return place, paths

    return save


@pytest.fixture
def filled(store):
    """A store of 12 pictures with ids p0 to p11 and a year each, and the pictures."""
    shown = tiny.pictures(12)
    years = [{"year": 2000 + index, "maker": "O'Hara" if index % 2 else "Ann"} for index in range(12)]
    store.add(shown, ids=[f"p{index}" for index in range(12)], metadata=years)
    return store, shown


@pytest.fixture
def on_accelerator(monkeypatch):
    """The job takes the model for one on an accelerator, and prepares each batch while the one before is computed."""
    monkeypatch.setattr(Compressor, "is_on_cpu", False)


@pytest.fixture(params=["cpu", "accelerator"])
def each_device(request):
    """The test runs both ways."""
    if request.param == "accelerator":
        request.getfixturevalue("on_accelerator")
