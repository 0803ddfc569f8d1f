"""`add`: metadata as columns, their types, and values that do not fit."""

import os
from datetime import date, datetime, timedelta, timezone

import numpy as np
import pytest
import tiny
from store_reports import counts


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
