"""No store, a damaged store, a store of another version: errors that say what to do."""

import json
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest

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
    with pytest.raises(OSError, match="A file of it is damaged or missing; restore it"):
        reader.summary("p1")
    file.write_bytes(content)
    assert len(SummaryStore.open(store.path).summary("p1")) == 1


def test_damaged_manifest_is_named_as_such(filled):
    store, _ = filled
    newest = min(Path(store.path, f"{TABLE}.lance", "_versions").glob("*.manifest"))
    newest.write_bytes(newest.read_bytes()[:20])
    with pytest.raises(OSError, match="A file of it is damaged or missing"):
        SummaryStore.open(store.path)


def test_half_made_folder_of_a_killed_create_can_be_made_anew(new_store, tmp_path):
    (tmp_path / "store" / f"{TABLE}.lance" / "data").mkdir(parents=True)
    assert len(new_store()) == 0
