"""No store, a damaged store, a store of another version: errors that say what to do."""

import json
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.table import METADATA_KEY, TABLE


def test_no_store_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no store. Make one with SummaryStore.create"):
        SummaryStore.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no store"):
        SummaryStore.open(tmp_path / "photos")


def test_store_where_a_file_is_is_refused(new_store, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="is a file. Give a folder"):
        new_store("file")
    assert (tmp_path / "file").read_text() == "precious"


def test_another_table_of_lancedb_is_no_store(tmp_path):
    lancedb.connect(tmp_path).create_table(TABLE, [{"a": 1}])
    with pytest.raises(ValueError, match="is no store of summaries"):
        SummaryStore.open(tmp_path)


def test_store_of_another_format_version_is_refused(store, tmp_path):
    schema = store._table.table.schema
    values = {**json.loads(schema.metadata[METADATA_KEY]), "format_version": 99}
    newer = pa.schema(list(schema), metadata={METADATA_KEY: json.dumps(values)})
    lancedb.connect(tmp_path / "newer").create_table(TABLE, schema=newer)
    with pytest.raises(ValueError, match="has store format 99; this version of fwd2bot reads 1"):
        SummaryStore.open(tmp_path / "newer")


@pytest.mark.parametrize("damage", ["cut", "zeros", "gone"])
def test_damaged_data_file_is_named_as_such(filled, damage):
    store, _ = filled
    [file] = Path(store.path, f"{TABLE}.lance", "data").iterdir()
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    reader = SummaryStore.open(store.path)
    message = "A file of it is missing.*damaged; restore it" if damage == "gone" else "damaged or missing; restore it"
    with pytest.raises(OSError, match=message):
        reader.summary("p1")
    file.write_bytes(content)
    assert len(SummaryStore.open(store.path).summary("p1")) == 1


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_check_of_a_whole_store_counts_its_rows(new_store, codec):
    store = new_store(codec=codec)
    assert store.check() == 0
    store.add(tiny.pictures(9))
    store.add_summary(torch.randn(40, 4, 32), ids=[str(index) for index in range(40)])
    store.delete("7")
    assert store.check() == 48


@pytest.mark.parametrize("damage", ["all", "front", "short", "gone"])
def test_check_finds_an_overwritten_data_file(filled, damage):
    store, _ = filled
    store.add(tiny.pictures(12, seed=1))
    file = min(Path(store.path, f"{TABLE}.lance", "data").iterdir(), key=lambda one: one.stat().st_mtime_ns)
    content, noise = file.read_bytes(), np.random.default_rng(0).bytes(10**6)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"all": noise[: len(content)], "front": noise[:1000] + content[1000:], "short": b"x"}[damage])
    reader = SummaryStore.open(store.path)
    assert reader.stats()["rows"] == 24  # which does not look at it
    with pytest.raises(OSError, match="restore it from a copy.* Columns that cannot be read: "):
        reader.check()


@pytest.mark.parametrize("part", ["tokens", "embedding"])
@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_check_names_a_row_whose_bytes_were_exchanged(new_store, codec, part):
    store = new_store(codec=codec)
    store.add(tiny.pictures(12), ids=[f"p{index}" for index in range(12)])
    [row] = store._table.find("id", ["p3"], ["tokens", "embedding"])
    old = row["tokens"] if part == "tokens" else np.asarray(row["embedding"], np.float16).tobytes()
    [file] = Path(store.path, f"{TABLE}.lance", "data").iterdir()
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, np.random.default_rng(0).permuted(np.frombuffer(old, np.uint8)).tobytes()))
    with pytest.raises(OSError, match="12 of 12 rows were found, and in 1 of them .* These are p3. Delete them"):
        SummaryStore.open(store.path).check()


def test_uri_that_went_through_pathlib_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'s3:/bucket/store' is no URI.* Give it as a str"):
        SummaryStore.open(Path("s3://bucket/store"))
    assert not list(tmp_path.iterdir())


def test_damaged_manifest_is_named_as_such(filled):
    store, _ = filled
    newest = min(Path(store.path, f"{TABLE}.lance", "_versions").glob("*.manifest"))
    newest.write_bytes(newest.read_bytes()[:20])
    with pytest.raises(OSError, match="A file of it is damaged or missing"):
        SummaryStore.open(store.path)


def test_half_made_folder_of_a_killed_create_can_be_made_anew(new_store, tmp_path):
    (tmp_path / "store" / f"{TABLE}.lance" / "data").mkdir(parents=True)
    assert len(new_store()) == 0


def test_store_of_a_process_that_was_killed_in_create_can_be_made_anew(shared_fwd2bot, tiny_processor, tmp_path):
    (tmp_path / "store" / f"{TABLE}.lance" / "_versions").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no store"):
        SummaryStore.open(tmp_path / "store")
    store = SummaryStore.create(tmp_path / "store", shared_fwd2bot, tiny_processor, exist_ok=True)
    assert len(store) == 0 and store.add(tiny.pictures(2)).added == 2
