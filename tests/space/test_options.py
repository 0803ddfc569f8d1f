"""How a Space is started: options, environment, checkpoints, stores; and what is said when one of them is wrong."""

import shutil

import pytest
import tiny

from fwd2bot.pipelines.embedded import default_checkpoint, gallery
from fwd2bot.space_app.options import SpaceOptions, load_service
from fwd2bot.space_app.uploads import VisitorError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "fwd2bot-test"
    tiny.tiny_fwd2bot(num_summary_tokens=8).save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, service):
    """Twelve pictures of the gallery, at 8 tokens."""
    store_module = pytest.importorskip("fwd2bot.pipelines.store")
    path = tmp_path_factory.mktemp("stores") / "gallery.store"
    made = store_module.SummaryStore.create(path, service.model, service.processor, num_summary_tokens=8, codec="fp16")
    made.add([picture.path for picture in gallery()[40:52]])
    return path


def test_environment_fills_in_what_no_option_gives():
    environment = {"FWD2BOT_SPACE_MODEL": "a/b", "FWD2BOT_SPACE_STORE": "s", "FWD2BOT_SPACE_TRUST_REMOTE_CODE": "1"}
    found = SpaceOptions(model="c/d").or_environment(environment)
    assert (found.model, found.store, found.trust_remote_code) == ("c/d", "s", True)


def test_remote_code_is_off_unless_it_is_switched_on():
    assert not SpaceOptions().or_environment({"FWD2BOT_SPACE_TRUST_REMOTE_CODE": "0"}).trust_remote_code
    with pytest.raises(ValueError, match="FWD2BOT_SPACE_TRUST_REMOTE_CODE='yes' must be 1"):
        SpaceOptions().or_environment({"FWD2BOT_SPACE_TRUST_REMOTE_CODE": "yes"})


def test_any_checkpoint_folder_serves(checkpoint, visitor):
    found = load_service(SpaceOptions(model=str(checkpoint), device="cpu"))
    assert found.max_length == 8
    assert len(found.search(visitor, "两个雪人", 8)) == 6  # only the embedded one knows no other script
    assert len(found.visitors) == 1


def test_copy_of_the_checkpoint_in_the_package_refuses_other_scripts(tmp_path, visitor):
    """As it lies in an exported Space."""
    shutil.copytree(default_checkpoint(), tmp_path / "checkpoint")
    found = load_service(SpaceOptions(model=str(tmp_path / "checkpoint"), device="cpu"))
    with pytest.raises(VisitorError, match="simple English only"):
        found.search(visitor, "два снеговика", 8)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"),
        ("model.safetensors", "cut off"),
        ("tokenizer.json", b"{}"),
    ],
    ids=["pointer", "cut off", "tokenizer"],
)
def test_damaged_checkpoint_is_told_with_the_remedy(checkpoint, tmp_path, name, content):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    content = (folder / name).read_bytes()[:-1000] if content == "cut off" else content
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded .*download it again, with `git lfs pull`"):
        load_service(SpaceOptions(model=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu9"}, "'gpu9' cannot be used.* Give another --device"),
        ({"dtype": "float99"}, "--dtype 'float99' is not known. Give one of auto, float32"),
    ],
)
def test_device_or_precision_that_does_not_exist_is_told(options, words):
    with pytest.raises(ValueError, match=words):
        load_service(SpaceOptions(**options))


def test_missing_model_is_an_error_that_names_it():
    with pytest.raises(OSError, match="There is no folder '/nowhere/at/all'"):
        load_service(SpaceOptions(model="/nowhere/at/all"))


def test_missing_store_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("lancedb")
    with pytest.raises(FileNotFoundError, match="holds no store. Make one"):
        load_service(SpaceOptions(store=str(tmp_path / "no.store")))


def test_pictures_of_a_store_are_found_asked_about_and_not_changed(store, visitor):
    before = sorted((path.relative_to(store), path.stat().st_mtime_ns) for path in store.rglob("*"))
    found = load_service(SpaceOptions(store=str(store), device="cpu"))
    assert found.max_length == 8 and len(found.collection.pictures) == 12
    [best] = found.search(visitor, "two snowmen on a blue field", 8, top_k=1)
    assert best.picture.title == "47.png" and best.picture.jpeg is not None
    *_, done = found.ask(visitor, "What colour is the background?", [best.picture.id], 4)
    assert done.summary.text == done.uncompressed.text == "blue"
    assert [hit.picture.title for hit in found.rerank(visitor, 2, top_k=1)] == ["47.png"]
    assert sorted((path.relative_to(store), path.stat().st_mtime_ns) for path in store.rglob("*")) == before


def test_original_of_a_store_is_not_enlarged_and_read_once(store, visitor, monkeypatch):
    from fwd2bot.space_app import collection

    found = load_service(SpaceOptions(store=str(store), device="cpu"))
    assert {picture.image().size for picture in found.collection.pictures} == {(96, 96)}
    monkeypatch.setattr(collection, "original", None)  # all of them have been read
    assert len(found.search(visitor, "two snowmen", 8)) == len(found.rerank(visitor, 2)) == 6


def test_memory_for_pictures_of_a_store_is_bounded(store, visitor, monkeypatch):
    from fwd2bot.space_app import collection

    monkeypatch.setattr(collection, "KEPT", 4)
    found = load_service(SpaceOptions(store=str(store), device="cpu"))
    assert len(found.search(visitor, "two snowmen", 8)) == 6
    assert len(found.collection._shown) == 4


def test_picture_whose_original_is_gone_is_still_answered_from_its_summary(store, visitor, monkeypatch):
    from fwd2bot.space_app import collection

    monkeypatch.setattr(collection, "original", lambda source, side, enlarge: None)
    found = load_service(SpaceOptions(store=str(store), device="cpu"))
    [best] = found.search(visitor, "two snowmen on a blue field", 8, top_k=1)
    *_, done = found.ask(visitor, "What colour is the background?", [best.picture.id], 8)
    assert done.summary.text == "blue" and "cannot be reached" in done.note
    with pytest.raises(VisitorError, match="original of “47.png” cannot be reached"):
        found.look(visitor, best.picture.id, 4, [])
