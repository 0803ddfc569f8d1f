"""`add`: every sort of input, what is skipped, what is a duplicate, what is replaced, and what fails."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from fwd2bot.pipelines.store import IndexReport, SummaryStore


def counts(report: IndexReport) -> tuple[int, int, int, int, int]:
    return report.added, report.updated, report.duplicates, report.skipped, len(report.failed)


def sources(store) -> set[str]:
    return {row["source"] for row in store.get(list(store))}


def png(path) -> bytes:
    return path.read_bytes()


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


@pytest.mark.parametrize("sort", ["path", "str", "bytes", "pil", "array"])
def test_single_picture_of_every_sort_is_added(store, save_pictures, sort):
    _, [path] = save_pictures(1)
    with Image.open(path) as opened:
        shown = opened.convert("RGB")
    given = {"path": path, "str": str(path), "bytes": png(path), "pil": shown, "array": np.asarray(shown)}[sort]
    assert counts(store.add(given)) == (1, 0, 0, 0, 0)
    assert store.search(shown, 1)[0]["score"] == pytest.approx(1, abs=2e-3)


def test_glob_takes_what_fits(store, save_pictures):
    folder, paths = save_pictures(12)
    assert counts(store.add(f"{folder}/0-00*.png")) == (10, 0, 0, 0, 0)
    assert sources(store) == set(map(str, paths[:10]))


@pytest.mark.parametrize("error", [RuntimeError, ConnectionError])
def test_iterator_is_read_as_a_stream(store, monkeypatch, error):
    given, compressed = [], []
    original = store._compressor.pictures

    def compress(pictures):
        compressed.extend(pictures)
        assert len(given) - len(compressed) <= 4 * 8  # pictures in memory: a few batches
        return original(pictures)

    def stream():
        for index, picture in enumerate(tiny.pictures(200)):
            if index == 190:
                raise error("the source broke")
            given.append(index)
            yield picture

    monkeypatch.setattr(store._compressor, "pictures", compress)
    with pytest.raises(error, match="the source broke"):
        store.add(stream(), batch_size=8, commit_every=50)
    done = len(compressed)
    assert 150 < len(store) == done  # what was compressed before is committed
    assert counts(store.add(tiny.pictures(200), batch_size=8)) == (200 - done, 0, 0, done, 0)


def test_list_may_mix_folders_files_and_rows(store, save_pictures):
    folder, _ = save_pictures(2)
    _, [other] = save_pictures(1, seed=1, folder="other")
    row = {"image": tiny.pictures(1, seed=2)[0], "id": "chosen", "title": "x"}
    assert counts(store.add([folder, other, row])) == (4, 0, 0, 0, 0)
    assert store.get("chosen")[0]["metadata"] == {"title": "x"}


def test_data_set_gives_pictures_ids_and_metadata(store, save_pictures):
    import datasets

    _, paths = save_pictures(4)
    rows = {
        "image": list(map(str, paths)),
        "id": [10, 11, 12, 13],
        "label": list("abcd"),
        "size_cm": [1.5, 2, 3, None],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert counts(store.add(data)) == (4, 0, 0, 0, 0)
    assert counts(store.add(data)) == (0, 0, 0, 4, 0)
    assert store.get("11")[0]["metadata"] == {"label": "b", "size_cm": 2.0}
    assert counts(store.add(data.remove_columns("id"))) == (0, 0, 0, 4, 0)  # the same files


def test_parquet_files_of_both_layouts_are_read(store, save_pictures, tmp_path):
    _, paths = save_pictures(4)
    structs = [{"bytes": png(path), "path": path.name} for path in paths[:2]]
    pq.write_table(pa.table({"image": structs, "label": ["a", "b"]}), tmp_path / "hub.parquet")
    pq.write_table(pa.table({"jpg": [png(path) for path in paths[2:]], "n": [1, 2]}), tmp_path / "plain.parquet")
    assert counts(store.add(tmp_path / "hub.parquet")) == (2, 0, 0, 0, 0)
    assert counts(store.add(str(tmp_path / "plain.parquet"))) == (2, 0, 0, 0, 0)
    assert sources(store) == {str(tmp_path / f"{name}.parquet#{row}") for name in ("hub", "plain") for row in (0, 1)}
    assert {row["metadata"]["label"] for row in store.get(list(store))} == {"a", "b", None}
    assert counts(store.add(paths)) == (0, 0, 4, 0, 0)  # the same bytes as files


def test_shards_are_read_from_a_glob_a_list_and_a_folder(new_store, save_pictures, tmp_path):
    _, paths = save_pictures(6)
    shards = tmp_path / "data" / "train"
    shards.mkdir(parents=True)
    for index in range(3):
        content = [png(path) for path in paths[2 * index : 2 * index + 2]]
        pq.write_table(pa.table({"image": content, "n": [index, index]}), shards / f"{index}.parquet")
    files = sorted(shards.iterdir())
    rows = {f"{file}#{row}" for file in files for row in (0, 1)}
    for name, given in {"glob": f"{shards}/*.parquet", "list": files, "folder": tmp_path / "data"}.items():
        store = new_store(name)
        assert counts(store.add(given)) == (6, 0, 0, 0, 0)
        assert counts(store.add(given)) == (0, 0, 0, 6, 0)
        assert sources(store) == rows and {row["metadata"]["n"] for row in store.get(list(store))} == {0, 1, 2}


def test_glob_may_fit_pictures_and_parquet_files(store, save_pictures):
    folder, paths = save_pictures(3)
    pq.write_table(pa.table({"image": [png(paths[0])]}), folder / "rows.parquet")
    paths[0].unlink()
    assert counts(store.add(f"{folder}/*")) == (3, 0, 0, 0, 0)


def test_parquet_files_beside_pictures_are_left_out_of_a_folder(store, save_pictures):
    folder, _ = save_pictures(2)
    pq.write_table(pa.table({"file_name": ["0-000.png"], "caption": ["x"]}), folder / "metadata.parquet")
    assert counts(store.add(folder)) == (2, 0, 0, 0, 0)


def test_parquet_without_a_column_of_pictures_is_refused(store, tmp_path):
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], none called 'image'"):
        store.add(tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as a parquet file"):
        store.add(tmp_path / "bad.parquet")


def test_broken_pictures_are_listed_and_the_rest_is_stored(store, save_pictures):
    folder, paths = save_pictures(6)
    paths[1].write_bytes(b"text")
    paths[3].write_bytes(png(paths[3])[:60])
    report = store.add([*paths, folder / "gone.png", {"image": 3.5}])
    assert counts(report) == (4, 0, 0, 0, 4)
    reasons = dict(report.failed)
    assert "no picture in a format" in reasons[str(paths[1])] and "damaged" in reasons[str(paths[3])]
    assert "No such file" in reasons[str(folder / "gone.png")] and "A picture must be" in reasons["a NoneType"]


def test_strict_stops_at_a_broken_picture_and_keeps_what_came_before(store, save_pictures):
    folder, paths = save_pictures(30)
    paths[25].write_bytes(b"text")
    with pytest.raises(ValueError, match="0-025.png: An image"):
        store.add(folder, strict=True, batch_size=4)
    assert len(store) == 27  # the six batches before, and the three good ones of its own
    paths[25].unlink()
    assert counts(store.add(folder, strict=True)) == (2, 0, 0, 27, 0)


def test_picture_that_the_model_refuses_fails_alone(store, monkeypatch):
    shown = tiny.pictures(5)
    original = store._compressor.pictures

    def refuse_one(pictures):
        if any(picture.size == shown[2].size for picture in pictures):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return original(pictures)

    monkeypatch.setattr(store._compressor, "pictures", refuse_one)
    report = store.add(shown)
    assert counts(report) == (4, 0, 0, 0, 1) and "aspect ratio" in report.failed[0][1]


def test_metadata_make_columns_and_keep_their_types(store):
    shown = tiny.pictures(3)
    store.add(shown[:1], ids=["a"], metadata=[{"year": 2020, "tags": ["x", "y"], "good": True}])
    store.add(shown[1:2], ids=["b"], metadata={"year": None, "place": "Łódź"})
    report = store.add(shown[2:], ids=["c"], metadata={"year": "MMXX"})
    assert "Metadata 'year' is int64 in the store, got 'MMXX'" in report.failed[0][1]
    assert store.get("a")[0]["metadata"] == {"year": 2020, "tags": ["x", "y"], "good": True, "place": None}
    assert store.get("b")[0]["metadata"]["place"] == "Łódź"


def test_new_metadata_of_a_file_are_written(store, save_pictures):
    folder, _ = save_pictures(3)
    store.add(folder, metadata={"album": "one"})
    assert counts(store.add(folder, metadata={"album": "one"})) == (0, 0, 0, 3, 0)
    assert counts(store.add(folder, metadata={"album": "two"})) == (0, 3, 0, 0, 0)
    assert {row["metadata"]["album"] for row in store.get(list(store))} == {"two"} and len(store) == 3


def test_metadata_that_are_not_given_again_stay(store, save_pictures):
    folder, paths = save_pictures(2)
    store.add(folder, metadata={"year": 2020})
    assert counts(store.add(folder, metadata={"album": "x"})) == (0, 2, 0, 0, 0)
    tiny.pictures(1, seed=9)[0].save(paths[0])
    assert counts(store.add(folder)) == (0, 1, 0, 1, 0)
    assert [row["metadata"] for row in store.get(list(store))] == [{"year": 2020, "album": "x"}] * 2


@pytest.mark.parametrize("value", [("a", "b"), float("nan"), np.array([1, 2]), np.float32(0.1)], ids=str)
def test_metadata_that_are_given_again_are_the_same(store, save_pictures, value):
    folder, _ = save_pictures(1)
    assert counts(store.add(folder, metadata={"of": value})) == (1, 0, 0, 0, 0)
    assert counts(store.add(folder, metadata={"of": value})) == (0, 0, 0, 1, 0)


def test_touched_file_leaves_its_row_and_metadata_to_itself(store, save_pictures):
    _, paths = save_pictures(1)
    copy = paths[0].with_name("copy.png")
    copy.write_bytes(paths[0].read_bytes())
    call = {"images": [paths[0], copy], "metadata": [{"title": "first"}, {"title": "copy"}]}
    store.add(**call)
    os.utime(paths[0], ns=(1, 1))
    assert counts(store.add(**call)) == (0, 0, 1, 1, 0)
    [row] = store.get(list(store))
    assert (row["source"], row["metadata"]) == (str(paths[0]), {"title": "first"})


def test_adding_a_file_leaves_pictures_that_were_opened_from_it(store, tmp_path):
    frames = tiny.pictures(3)
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    opened = Image.open(tmp_path / "x.gif")
    for number in range(3):
        opened.seek(number)
        store.add(opened)
    assert len(store) == 3 and sources(store) == {str(tmp_path / "x.gif")}
    store.add(tmp_path / "x.gif")
    assert len(store) == 4


@pytest.mark.parametrize("name", ["id", "Hash", "_rowid", "my col", "a.b", "", "ü", "embedding"])
def test_names_that_metadata_cannot_have_are_refused(store, name):
    with pytest.raises(ValueError, match="cannot be the name of metadata"):
        store.add(tiny.pictures(1), metadata={name: 1})
    assert len(store) == 0


@pytest.mark.parametrize(
    ("ids", "metadata", "message"),
    [
        (["a"], None, "2 picture.s. came with 1 ids"),
        (["a", "b", "c"], None, "2 picture.s. came with 3 ids"),
        (None, [{}], "2 picture.s. came with 1 metadata"),
        (iter(["a"]), None, "more pictures than ids: 1"),
        (iter("abc"), None, "only 2 picture.s., but more ids"),
        (["a", 1.5], None, "An id must be a str"),
    ],
)
def test_ids_or_metadata_of_another_number_are_refused(store, ids, metadata, message):
    with pytest.raises(ValueError, match=message):
        store.add(tiny.pictures(2), ids=ids, metadata=metadata)


def test_empty_folder_and_folder_of_texts_are_refused(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        store.add(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="holds no picture"):
        store.add(tmp_path / "empty")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("no/such/place", FileNotFoundError, "does not exist"),
        ("no/such/*.png", FileNotFoundError, "No file fits the pattern"),
        ([], ValueError, "No picture was given"),
        (7, TypeError, "images must be a picture"),
        ({"photo": 1}, ValueError, r"A row has the columns \['photo'\], none of which is 'image'"),
    ],
)
def test_what_holds_no_pictures_is_refused(store, images, error, message):
    with pytest.raises(error, match=message):
        store.add(images)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"commit_every": True}, {"batch_size": 1.5}])
def test_numbers_out_of_range_are_refused(store, arguments):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        store.add(tiny.pictures(1), **arguments)


def test_file_whose_name_is_not_utf8_is_listed(store, save_pictures):
    folder, [path] = save_pictures(1)
    os.rename(path, os.fsencode(folder) + b"/\xff.png")
    report = store.add(folder)
    assert len(report.failed) == 1 and "not UTF-8" in report.failed[0][1]


def test_first_frame_stands_for_an_animation(store, tmp_path):
    frames = tiny.pictures(3)
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    store.add(tmp_path / "a.tiff")
    assert store.search(frames[0], 1)[0]["score"] == pytest.approx(1, abs=2e-3)
    assert store.get(list(store))[0]["page"] is None


def test_many_commits_are_joined_into_few_files(store):
    start = time.time()
    store.add(tiny.pictures(60), batch_size=1, commit_every=1)
    assert len(store) == 60 and store.stats()["fragments"] < 50
    assert SummaryStore.open(store.path).get(list(store))[0]["added"].timestamp() >= start - 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 2.7),
        (1, 2**70),
        (1.5, 2**60 + 1),
        ([1], [1.5]),
        (date(2020, 1, 2), datetime(2020, 1, 2, 23, 59)),
        (datetime(2020, 1, 1), datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=5)))),
    ],
    ids=str,
)
def test_metadata_that_a_column_would_change_are_a_failure(store, first, second):
    shown = tiny.pictures(2)
    store.add(shown[:1], ids=["a"], metadata={"of": first})
    report = store.add(shown[1:], ids=["b"], metadata={"of": second})
    assert counts(report) == (0, 0, 0, 0, 1) and "Metadata 'of' is " in report.failed[0][1]
    assert list(store) == ["a"] and store.get("a")[0]["metadata"] == {"of": first}


def test_every_value_that_does_not_fit_is_named(store):
    shown = tiny.pictures(2)
    store.add(shown[:1], metadata={"year": 2020, "place": "x"})
    [(_, reason)] = store.add(shown[1:], metadata={"year": "MMXX", "place": 5}).failed
    assert "'year' is int64" in reason and "'place' is string" in reason


def test_metadata_that_do_not_fit_are_listed_for_files_in_the_store_too(store, save_pictures):
    _, [path, other] = save_pictures(2)
    store.add(path, metadata={"year": 2020})
    store.add(other)
    report = store.add(other, metadata={"year": "abc"})
    assert counts(report) == (0, 0, 0, 0, 1) and "'year' is int64 in the store, got 'abc'" in report.failed[0][1]


def test_empty_list_waits_for_a_full_one_to_tell_its_type(store):
    shown = tiny.pictures(3)
    assert counts(store.add(shown[:1], ids=["a"], metadata={"tags": []})) == (1, 0, 0, 0, 0)
    assert counts(store.add(shown[1:], ids=["b", "c"], metadata=[{"tags": ["x"]}, {"tags": []}])) == (2, 0, 0, 0, 0)
    assert [row["metadata"]["tags"] for row in store.get(["a", "b", "c"])] == [None, ["x"], []]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_folder_that_cannot_be_read_is_listed():
    code = (
        "import os, sys; from fwd2bot.pipelines.store.sources import each_item; os.setuid(65534); "
        "print([(item.source, item.error) for item in each_item(sys.argv[1])])"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o700)
        tiny.pictures(1)[0].save(folder / "0.png")
        command = [sys.executable, "-c", code, name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"('{folder / '0.png'}', None)" in said
    assert f"('{folder / 'locked'}', 'The folder cannot be read: Permission" in said


@pytest.mark.parametrize("commit_every", [1, 512])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_second_picture_of_an_id_is_listed(store, commit_every, batch_size):
    shown = tiny.pictures(4)
    with pytest.raises(ValueError, match="The id 'a' is given to several pictures"):
        store.add(shown, ids=["a", "b", "c", "a"])
    rows = [{"image": one, "id": id} for one, id in zip([*shown, shown[0]], "aabba", strict=True)]
    report = store.add(iter(rows), batch_size=batch_size, commit_every=commit_every)
    assert (report.added, report.updated, len(report.failed)) == (2, 0, 2)
    assert "The id 'a' was given to another picture since this call began" in report.failed[0][1]
    assert store.search(shown[0], 1)[0]["id"] == "a"


def test_broken_shard_among_several_is_listed_and_the_others_are_stored(new_store, save_pictures, tmp_path):
    _, paths = save_pictures(3)
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"image": [png(paths[0])]}), shards / "a.parquet")
    (shards / "b.parquet").write_bytes(b"garbage")
    pq.write_table(pa.table({"image": [png(path) for path in paths[1:]]}), shards / "c.parquet")
    whole = (shards / "a.parquet").read_bytes()
    (shards / "d.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])  # its end, which is read first, is whole
    for name, given in {"folder": shards, "glob": f"{shards}/*", "list": sorted(shards.iterdir())}.items():
        store = new_store(name)
        report = store.add(given)
        assert counts(report) == (3, 0, 0, 0, 2)
        assert [source for source, _ in report.failed] == [str(shards / "b.parquet"), str(shards / "d.parquet")]
        assert "cannot be read as a parquet file" in report.failed[0][1]
        with pytest.raises(ValueError, match="b.parquet: .*cannot be read as a parquet file"):
            new_store(f"strict {name}").add(given, strict=True)


def test_source_of_an_opened_picture_is_absolute(store, save_pictures, monkeypatch):
    folder, [path] = save_pictures(1)
    monkeypatch.chdir(folder)
    store.add(Image.open(path.name))
    assert sources(store) == {str(path)}


def test_file_of_another_sort_is_left_out_and_a_huge_one_is_not_read(store, save_pictures):
    folder, [path] = save_pictures(1)
    for name in ("paper.pdf", "film.mpg"):
        (folder / name).write_bytes(b"no picture")
    with open(folder / "huge.png", "wb") as huge:
        huge.truncate(2**31)  # which takes no room on the disk
    report = store.add(folder)
    assert (
        counts(report) == (1, 0, 0, 0, 1) and "2,147,483,648 bytes, and a file may have 1,073" in report.failed[0][1]
    )
