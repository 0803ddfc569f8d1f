"""Export: every row in every format, whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from test_store_interrupted import full_disk

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.table import TABLE


def test_parquet_has_id_vector_and_payload(filled, tmp_path):
    store, _ = filled
    store.export(tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "vector", "payload"] and table.num_rows == 12
    for row in table.to_pylist():
        [(_, vectors)] = store.embeddings(row["id"])
        assert np.array_equal(np.array(row["vector"], np.float32), vectors[0])
        [expected] = store.get(row["id"])
        assert row["payload"]["year"] == expected["metadata"]["year"] and row["payload"]["hash"] == expected["hash"]


def test_json_lines_have_id_vector_and_payload(filled, tmp_path):
    store, _ = filled
    store.export(tmp_path / "out.jsonl", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == set(store)
    assert all(set(row) == {"id", "vector", "payload"} and len(row["vector"]) == 32 for row in rows)
    assert {row["payload"]["maker"] for row in rows} == {"Ann", "O'Hara"}


def test_json_lines_have_null_for_what_is_no_number(store, tmp_path):
    values = [{"x": float("nan")}, {"x": float("inf")}, {"x": 1.5}]
    store.add(tiny.pictures(3), ids=["a", "b", "c"], metadata=values)
    store.export(tmp_path / "out.jsonl", "jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert {row["id"]: row["payload"]["x"] for row in rows} == {"a": None, "b": None, "c": 1.5}


def test_numpy_folder_has_embeddings_tokens_and_rows(filled, tmp_path):
    store, _ = filled
    store.export(tmp_path / "out", "numpy")
    embeddings, tokens = np.load(tmp_path / "out" / "embeddings.npy"), np.load(tmp_path / "out" / "tokens.npy")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    names = [row["id"] for row in rows]
    assert embeddings.shape == (12, 32) and embeddings.dtype == np.float16 and set(names) == set(store)
    assert np.array_equal(tokens, store.summary(names).tokens.numpy())
    [(_, expected)] = store.embeddings(names)
    assert np.array_equal(embeddings.astype(np.float32), expected)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "numpy"])
def test_empty_store_is_exported(store, tmp_path, format):
    store.export(tmp_path / "out", format)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["parquet", "jsonl", "numpy"])
def test_export_to_a_full_disk_leaves_nothing_new(filled, tmp_path, format):
    store, _ = filled
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").write_text("precious")
    target = place / ("new" if format == "numpy" else "old")
    with full_disk(1500), pytest.raises(OSError, match="failed, and nothing was written there"):
        store.export(target, format, overwrite=True)
    assert [path.name for path in place.iterdir()] == ["old"]
    assert (place / "old").read_text() == "precious"


@pytest.mark.parametrize("format", ["parquet", "jsonl", "numpy"])
def test_export_of_a_damaged_store_says_so_and_leaves_nothing(filled, tmp_path, format):
    store, _ = filled
    [file] = Path(store.path, f"{TABLE}.lance", "data").iterdir()
    file.write_bytes(bytes(file.stat().st_size))
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"failed, and nothing was written there: .* make the store anew\.$"):
        SummaryStore.open(store.path).export(tmp_path / "dump", format)
    assert set(tmp_path.iterdir()) == before


def test_export_to_wrong_places_and_formats_is_refused(filled, tmp_path):
    store, _ = filled
    with pytest.raises(ValueError, match="format='csv' is unknown; choose one of 'parquet', 'numpy', 'jsonl'"):
        store.export(tmp_path / "x", "csv")
    with pytest.raises(FileExistsError, match="holds other files than those of an export"):
        store.export(tmp_path, "numpy")
    with pytest.raises(IsADirectoryError, match="is a folder. Give the name of a file"):
        store.export(tmp_path, "parquet")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        store.export(tmp_path / "no" / "x.parquet")


@pytest.mark.parametrize("format", ["parquet", "jsonl", "numpy"])
def test_export_overwrites_when_it_is_told_to(filled, tmp_path, format):
    store, _ = filled
    store.export(tmp_path / "out", format)
    store.delete("p0")
    with pytest.raises(FileExistsError, match="out exists. Choose another name"):
        store.export(tmp_path / "out", format)
    store.export(tmp_path / "out", format, overwrite=True)
    file = tmp_path / "out" / "rows.jsonl" if format == "numpy" else tmp_path / "out"
    assert len(pq.read_table(file) if format == "parquet" else file.read_text().splitlines()) == 11


def test_folder_that_cannot_be_replaced_stays_as_it_was(filled, tmp_path, monkeypatch):
    store, _ = filled
    store.export(tmp_path / "out", "numpy")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    store.delete("p0")
    replace = os.replace

    def refused(source, target):
        if (source / "rows.jsonl").read_text().count("\n") == 11:  # the new one
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="failed, and nothing was written there: Permission denied"):
        store.export(tmp_path / "out", "numpy", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_folder_of_other_files_is_not_overwritten(filled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other files"):
        filled[0].export(tmp_path / "out", "numpy", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
