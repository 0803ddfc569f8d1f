"""`add`: every sort of input, and what is no picture."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image
from store_reports import counts, png, sources


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
    original = store._compressor.compress

    def compress(inputs):
        compressed.extend(inputs["input_ids"])
        assert len(given) - len(compressed) <= 5 * 8  # pictures in memory: a few batches
        return original(inputs)

    def stream():
        for index, picture in enumerate(tiny.pictures(200)):
            if index == 190:
                raise error("the source broke")
            given.append(index)
            yield picture

    monkeypatch.setattr(store._compressor, "compress", compress)
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
