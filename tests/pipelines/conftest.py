"""The three pipelines on one tiny model, a checkpoint folder of it, and stores that the command line made."""

import shutil

import command_runner
import pytest
import tiny
import torch
from transformers import pipeline

from fwd2bot.pipelines.embedded import gallery
from fwd2bot.pipelines.store import SummaryStore


def build(task, model, processor, **arguments):
    return pipeline(task, model=model, processor=processor, device="cpu", **arguments)


@pytest.fixture(scope="session")
def vivid_fwd2bot():
    """A tiny model whose answers differ from picture to picture. Shared by the session: do not change it."""
    model = tiny.tiny_fwd2bot()
    with torch.no_grad():
        model.summary_projector.weight.mul_(3)
    return model


@pytest.fixture(scope="session")
def compress(vivid_fwd2bot, tiny_processor):
    """Shared by the session: do not change it."""
    return build("fwd2bot-compress", vivid_fwd2bot, tiny_processor)


@pytest.fixture
def retrieval(vivid_fwd2bot, tiny_processor):
    """A new one for every test: it has a memory."""
    return build("fwd2bot-retrieval", vivid_fwd2bot, tiny_processor)


@pytest.fixture(scope="session")
def answer(vivid_fwd2bot, tiny_processor):
    """Shared by the session: do not change it."""
    return build("fwd2bot-answer", vivid_fwd2bot, tiny_processor)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder as it would lie on the Hub; at most 8 summary tokens, as the demo needs."""
    folder = tmp_path_factory.mktemp("hub") / "fwd2bot-test"
    tiny.tiny_fwd2bot(num_summary_tokens=8).save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def count_calls(monkeypatch):
    """`count_calls(object, name)` replaces a method by itself, and returns a list that grows with every call."""

    def wrap(owner, name):
        calls = []
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return wrap


@pytest.fixture(scope="session")
def picture_store(tmp_path_factory, vivid_fwd2bot, tiny_processor):
    """A store of six picture files, ids p0 to p5, and a year each. Shared by the session: do not change it."""
    folder = tmp_path_factory.mktemp("rag")
    store = SummaryStore.create(folder / "store", vivid_fwd2bot, tiny_processor, codec="fp16")
    paths = [folder / f"{index}.png" for index in range(6)]
    for path, picture in zip(paths, tiny.pictures(6), strict=True):
        picture.save(path)
    store.add(paths, ids=[f"p{index}" for index in range(6)], metadata=[{"year": 2000 + index} for index in range(6)])
    return store


@pytest.fixture
def rag(vivid_fwd2bot, tiny_processor, picture_store):
    return build("fwd2bot-rag", vivid_fwd2bot, tiny_processor, store=picture_store)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of five pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    folder.mkdir()
    for index, picture in enumerate(tiny.pictures(5)):
        picture.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def photo_store(photos, checkpoint, tmp_path_factory):
    """A store of `photos` by a tiny model. Shared by the session: do not change it."""
    path = tmp_path_factory.mktemp("stores") / "photos.store"
    assert command_runner.run("index", photos, "--store", path, "--model", checkpoint, "-k", 4).exit_code == 0
    return path


@pytest.fixture
def own_store(photo_store, tmp_path):
    """A copy of `photo_store` that a test may change."""
    return shutil.copytree(photo_store, tmp_path / "own.store")


@pytest.fixture(scope="session")
def gallery_store(tmp_path_factory):
    """Some of the gallery, by the checkpoint inside the package."""
    path = tmp_path_factory.mktemp("gallery") / "gallery.store"
    files = [picture.path for picture in gallery()[40:52]]
    assert command_runner.run("index", *files, "--store", path, "-k", 8, "--codec", "int8").exit_code == 0
    return path


@pytest.fixture(scope="session")
def ids(photo_store):
    return sorted(SummaryStore.open(photo_store))
