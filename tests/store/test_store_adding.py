"""`add`: what is skipped, what is a duplicate, what is replaced, and what fails."""

import hashlib
import os
import threading
import time

import pytest
import tiny
import torch
from store_reports import counts, png, sources

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.indexing import IndexingJob
from fwd2bot.pipelines.store.sources import hash_bytes


def test_folder_is_indexed_with_the_folders_in_it(store, save_pictures):
    folder, paths = save_pictures(5)
    (folder / "deep" / "er").mkdir(parents=True)
    paths[0].rename(folder / "deep" / "er" / "moved.PNG")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    report = store.add(folder)
    assert counts(report) == (5, 0, 0, 0, 0) and report.rate > 0
    assert sources(store) == {str(path) for path in paths[1:]} | {str(folder / "deep" / "er" / "moved.PNG")}


def test_second_run_skips_every_file_without_reading_it(store, save_pictures, monkeypatch):
    folder, _ = save_pictures(5)
    store.add(str(folder))
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: pytest.fail(f"{self} was read"))
    assert counts(store.add(str(folder))) == (0, 0, 0, 5, 0)
    assert len(store) == 5


def test_touched_file_of_the_same_content_is_not_compressed_again(store, save_pictures, monkeypatch):
    folder, paths = save_pictures(3)
    store.add(folder)
    os.utime(paths[0], ns=(1, 1))
    monkeypatch.setattr(store._compressor.model, "compress", lambda **_: pytest.fail("compressed again"))
    assert counts(store.add(folder)) == (0, 0, 0, 3, 0)


def test_changed_file_replaces_its_row(store, save_pictures):
    folder, paths = save_pictures(4)
    store.add(folder)
    old = {row["id"] for row in store.get(list(store)) if row["source"] == str(paths[2])}
    tiny.pictures(1, seed=9)[0].save(paths[2])
    assert counts(store.add(folder)) == (0, 1, 0, 3, 0)
    assert len(store) == 4 and not old & set(store) and sources(store) == set(map(str, paths))


def test_file_that_broke_keeps_its_row(store, save_pictures):
    folder, paths = save_pictures(3)
    store.add(folder)
    paths[0].write_bytes(b"broken now")
    assert counts(store.add(folder)) == (0, 0, 0, 2, 1)
    assert len(store) == 3


def test_equal_content_is_stored_once(store, save_pictures):
    folder, paths = save_pictures(3)
    (folder / "copy.png").write_bytes(png(paths[0]))
    assert counts(store.add(folder)) == (3, 0, 1, 0, 0)
    assert counts(store.add(folder)) == (0, 0, 1, 3, 0)
    assert counts(store.add(png(paths[1]))) == (0, 0, 0, 1, 0)
    assert len(store) == 3


@pytest.mark.parametrize("first", ["a", "b"])
def test_copy_stays_in_the_store_when_the_file_of_its_row_changes(store, save_pictures, first):
    folder, [path] = save_pictures(1)
    files = {name: path.rename(folder / "a.png") if name == "a" else folder / "b.png" for name in "ab"}
    files["b"].write_bytes(png(files["a"]))
    store.add(files[first])
    assert counts(store.add(folder))[2:] == (1, 1, 0)
    tiny.pictures(1, seed=9)[0].save(files[first])
    store.add(folder)
    assert len(store) == 2 and sources(store) == set(map(str, files.values()))
    assert counts(store.add(folder)) == (0, 0, 0, 2, 0)


@pytest.mark.parametrize("commit_every", [1, 512])
def test_files_that_exchange_their_contents_keep_a_row_each(store, save_pictures, commit_every):
    folder, paths = save_pictures(2)
    store.add(folder)
    first, second = map(png, paths)
    for path, content, time_ns in ((paths[0], second, 1), (paths[1], first, 2)):
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
    store.add(folder, batch_size=1, commit_every=commit_every)
    rows = {row["source"]: row["hash"] for row in store.get(list(store))}
    assert rows == {str(path): hashlib.sha256(png(path)).hexdigest() for path in paths}


def test_file_that_became_a_copy_of_another_leaves_no_row_behind(store, save_pictures):
    folder, paths = save_pictures(2)
    store.add(folder)
    paths[1].write_bytes(png(paths[0]))
    assert counts(store.add(folder)) == (0, 0, 1, 1, 0)
    assert sources(store) == {str(paths[0])}


def test_row_whose_file_is_gone_is_kept_beside_a_copy(store, save_pictures):
    folder, paths = save_pictures(1)
    store.add(folder, metadata={"title": "kept"})
    paths[0].rename(folder / "moved.png")
    assert counts(store.add(folder)) == (0, 0, 1, 0, 0)
    assert store.get(list(store))[0]["metadata"] == {"title": "kept"}


def test_equal_content_is_stored_once_across_batches_and_commits(store):
    shown = tiny.pictures(6)
    assert counts(store.add(shown * 3, batch_size=4, commit_every=5)) == (6, 0, 12, 0, 0)
    assert len(store) == 6


def test_same_picture_under_chosen_ids_is_stored_under_each(store):
    [shown] = tiny.pictures(1)
    assert counts(store.add([shown, shown], ids=["a", "b"])) == (2, 0, 0, 0, 0)
    assert counts(store.add([shown, shown], ids=["a", "b"])) == (0, 0, 0, 2, 0)
    assert set(store) == {"a", "b"}


def test_id_is_the_hash_of_a_files_bytes(store, save_pictures):
    _, [path] = save_pictures(1)
    store.add(path)
    assert list(store) == [hashlib.sha256(png(path)).hexdigest()[:32]]


def test_broken_pictures_are_listed_and_the_rest_is_stored(store, save_pictures):
    folder, paths = save_pictures(6)
    paths[1].write_bytes(b"text")
    paths[3].write_bytes(png(paths[3])[:60])
    report = store.add([*paths, folder / "gone.png", {"image": 3.5}, b"text"])
    assert counts(report) == (4, 0, 0, 0, 5)
    reasons = dict(report.failed)
    assert reasons[str(paths[1])].startswith("it is no picture in a format") and "damaged" in reasons[str(paths[3])]
    assert "No such file" in reasons[str(folder / "gone.png")] and "A picture must be" in reasons["picture 7"]
    assert reasons["picture 8"].startswith("it is no picture in a format")  # what has no name, by its place


def test_strict_stops_at_a_broken_picture_and_keeps_what_came_before(store, save_pictures, each_device):
    folder, paths = save_pictures(30)
    paths[25].write_bytes(b"text")
    with pytest.raises(ValueError, match="0-025.png: it is no picture"):
        store.add(folder, strict=True, batch_size=4)
    assert len(store) == 27  # the six batches before, and the three good ones of its own
    paths[25].unlink()
    assert counts(store.add(folder, strict=True)) == (2, 0, 0, 27, 0)


def test_picture_that_the_model_refuses_fails_alone(store, monkeypatch, each_device):
    shown = tiny.pictures(5)
    original = store._compressor.prepare

    def refuse_one(pictures):
        if any(picture.size == shown[2].size for picture in pictures):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return original(pictures)

    monkeypatch.setattr(store._compressor, "prepare", refuse_one)
    report = store.add(shown)
    assert counts(report) == (4, 0, 0, 0, 1) and "aspect ratio" in report.failed[0][1]


def test_next_batch_is_prepared_while_an_accelerator_runs(store, monkeypatch, on_accelerator):
    prepare, compress = store._compressor.prepare, store._compressor.compress
    prepared, running = [], []

    def count(pictures):
        prepared.append(threading.current_thread())
        return prepare(pictures)

    def wait_for_the_next(inputs):
        running.append(threading.current_thread())
        begin = time.monotonic()
        while len(prepared) <= len(running) < 3:
            assert time.monotonic() - begin < 60, "the next batch waits for the model"
            time.sleep(0.001)
        return compress(inputs)

    monkeypatch.setattr(store._compressor, "prepare", count)
    monkeypatch.setattr(store._compressor, "compress", wait_for_the_next)
    assert counts(store.add(tiny.pictures(12), batch_size=4)) == (12, 0, 0, 0, 0)
    # The settings that torch has for a thread, such as autocast, hold for the model.
    assert set(running) == {threading.current_thread()} and threading.current_thread() not in prepared


def test_nothing_is_prepared_while_the_cpu_runs(store, monkeypatch):
    prepare, compress, said = store._compressor.prepare, store._compressor.compress, []

    def prepared(pictures):
        said.append("prepare")
        return prepare(pictures)

    def compressed(inputs):
        said.append("compress")
        time.sleep(0.05)  # in which another thread would have begun
        tokens = compress(inputs)
        said.append("compressed")
        return tokens

    monkeypatch.setattr(store._compressor, "prepare", prepared)
    monkeypatch.setattr(store._compressor, "compress", compressed)
    assert counts(store.add(tiny.pictures(12), batch_size=4)) == (12, 0, 0, 0, 0)
    assert said == ["prepare", "compress", "compressed"] * 3


def test_interrupted_among_pictures_that_go_one_by_one_keeps_those_that_are_done(store, monkeypatch, each_device):
    compress, sizes = store._compressor.compress, []

    def refuse_batches(inputs):
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > 1:
            raise ValueError("one of them")
        if len(sizes) == 4:
            raise KeyboardInterrupt
        return compress(inputs)

    monkeypatch.setattr(store._compressor, "compress", refuse_batches)
    with pytest.raises(KeyboardInterrupt):
        store.add(tiny.pictures(4), batch_size=4)
    assert sizes == [4, 1, 1, 1] and len(store) == 2


def test_pixels_of_known_pictures_are_gone_when_the_batch_is_compressed(store, monkeypatch):
    shown = tiny.pictures(4)
    store.add(shown[:2])
    finish, kept = IndexingJob._finish, []

    def look(job, batch, following=None):
        batch.prepared.result()
        kept.extend(item.picture is not None for item in batch.items)
        finish(job, batch, following)

    monkeypatch.setattr(IndexingJob, "_finish", look)
    assert counts(store.add(shown)) == (2, 0, 0, 2, 0)
    assert kept == [False, False, True, True]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_failure_of_a_picture_is_that_of_its_copies(store, save_pictures, monkeypatch, batch_size, each_device):
    folder, paths = save_pictures(4)
    store.add(folder)
    before = store.get(list(store))
    content = png(paths[0])
    for number, path in enumerate(paths):  # two broken copies each in a batch of their own
        path.write_bytes(content + bytes(1 + number // 2))
    nan = torch.full((4, 4, 32), torch.nan)
    monkeypatch.setattr(store._compressor, "compress", lambda inputs: nan[: len(inputs["pixel_values"])])
    report = store.add(paths, batch_size=batch_size)
    assert counts(report) == (0, 0, 0, 0, 4) and all("NaN" in reason for _, reason in report.failed)
    assert store.get(list(store)) == before  # no row goes for a copy that was not stored


@pytest.mark.parametrize("batch_size, commit_every", [(1, 1), (2, 1), (2, 2), (3, 512)])
def test_every_commit_has_a_row_for_every_changed_file(
    store, save_pictures, monkeypatch, batch_size, commit_every, each_device
):
    folder, paths = save_pictures(6)
    store.add(folder)
    old = {row["source"]: row["id"] for row in store.get(list(store))}
    content = png(paths[0])
    for number, path in enumerate(paths):  # three contents, of two files each
        path.write_bytes(content + bytes(1 + number // 2))
    upsert, commits = store._table.upsert, []

    def checked(*arguments):
        upsert(*arguments)
        commits.append(set(store))

    monkeypatch.setattr(store._table, "upsert", checked)
    report = store.add(paths, batch_size=batch_size, commit_every=commit_every)
    assert (report.updated, report.duplicates, len(store)) == (3, 3, 3)
    assert commits
    for rows in commits:
        assert all(rows & {old[str(path)], hash_bytes(path.read_bytes())[:32]} for path in paths)


def test_source_that_breaks_keeps_every_batch_that_was_full(store, each_device):
    def pictures():
        yield from tiny.pictures(10)
        raise OSError("the cable was pulled")

    with pytest.raises(OSError, match="the cable"):
        store.add(pictures(), batch_size=2)
    assert len(store) == 6  # of ten, some are being read and one is not yet a full batch


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"commit_every": True}, {"batch_size": 1.5}])
def test_numbers_out_of_range_are_refused(store, arguments):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        store.add(tiny.pictures(1), **arguments)


def test_many_commits_are_joined_into_few_files(store):
    start = time.time()
    store.add(tiny.pictures(60), batch_size=1, commit_every=1)
    assert len(store) == 60 and store.stats()["fragments"] < 50
    assert SummaryStore.open(store.path).get(list(store))[0]["added"].timestamp() >= start - 1


@pytest.mark.parametrize("commit_every", [1, 512])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_second_picture_of_an_id_is_listed(store, commit_every, batch_size, each_device):
    shown = tiny.pictures(4)
    with pytest.raises(ValueError, match="The id 'a' is given to several pictures"):
        store.add(shown, ids=["a", "b", "c", "a"])
    rows = [{"image": one, "id": id} for one, id in zip([*shown, shown[0]], "aabba", strict=True)]
    report = store.add(iter(rows), batch_size=batch_size, commit_every=commit_every)
    assert (report.added, report.updated, len(report.failed)) == (2, 0, 2)
    assert "The id 'a' was given to another picture since this call began" in report.failed[0][1]
    assert store.search(shown[0], 1)[0]["id"] == "a"
