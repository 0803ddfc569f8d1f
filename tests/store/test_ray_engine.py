"""The indexing job on a Ray cluster of two workers, started for these tests on this machine."""

import json

import numpy as np
import pytest
import tiny
import torch
from fwd2bot_cli import app
from typer.testing import CliRunner

from fwd2bot.pipelines.store import SummaryStore

pytest.importorskip("lance_ray", reason="the extra 'ray' is not installed")
# Ray Data copies its settings for each run, and warns of those that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

import lance  # noqa: E402  (after the check)

from fwd2bot.pipelines.store.ray_engine import RayEngine, _commit_fragments, _rounds  # noqa: E402
from fwd2bot.pipelines.store.sources import Item  # noqa: E402
from fwd2bot.pipelines.store.table import is_replaced  # noqa: E402


@pytest.fixture(scope="module")
def engine():
    import ray

    yield RayEngine(workers=2)
    ray.shutdown()


def counts(report) -> tuple[int, int, int, int, int]:
    return report.added, report.updated, report.duplicates, report.skipped, len(report.failed)


def content(store: SummaryStore) -> dict[str, tuple]:
    """By id: source, hash, metadata, tokens, embedding."""
    ids = sorted(store)
    assert len(ids) == len(set(ids)) == len(store)
    [(_, embeddings)] = store.embeddings(ids)
    rows = store.get(ids)
    tokens = store.summary(ids).tokens.numpy()
    return {
        row["id"]: (row["source"], row["hash"], row["metadata"], one, embedding)
        for row, one, embedding in zip(rows, tokens, embeddings, strict=True)
    }


def assert_same(store: SummaryStore, other: SummaryStore) -> None:
    found, wanted = content(store), content(other)
    assert sorted(found) == sorted(wanted)
    for one in wanted:
        assert found[one][:3] == wanted[one][:3]
        np.testing.assert_allclose(found[one][3], wanted[one][3], atol=2e-3)
        np.testing.assert_allclose(found[one][4], wanted[one][4], atol=2e-3)


@pytest.mark.slow
def test_cluster_fills_a_store_as_one_process_does_and_goes_on_where_it_was(new_store, save_pictures, engine):
    folder, paths = save_pictures(11)
    (folder / "copy.png").write_bytes(paths[3].read_bytes())
    (folder / "broken.png").write_bytes(paths[4].read_bytes()[:40])
    on_cluster, alone = new_store("cluster"), new_store("alone")
    shared = {"metadata": {"album": "drawn"}, "batch_size": 3}

    first = on_cluster.add(folder, engine=engine, commit_every=8, **shared)
    assert counts(first) == counts(alone.add(folder, **shared)) == (11, 0, 1, 0, 1)
    assert first.failed[0][0].endswith("broken.png") and "is no picture" in first.failed[0][1]
    assert_same(on_cluster, alone)
    [hit] = on_cluster.search(paths[5], top_k=1, where="album = 'drawn'")
    assert hit["source"] == str(paths[5])

    # Run again: a changed file, a new one, one that is whole now, one that became a copy, and two that changed places.
    tiny.pictures(1, seed=7)[0].save(paths[0])
    tiny.pictures(1, seed=8)[0].save(folder / "new.png")
    tiny.pictures(1, seed=9)[0].save(folder / "broken.png")
    paths[1].write_bytes(paths[2].read_bytes())
    six, seven = paths[6].read_bytes(), paths[7].read_bytes()
    paths[6].write_bytes(seven)
    paths[7].write_bytes(six)
    shared["metadata"]["year"] = 2020
    again = on_cluster.add(folder, engine=engine, **shared)
    assert counts(again) == counts(alone.add(folder, **shared))
    assert (again.added, len(again.failed)) == (2, 0)
    assert_same(on_cluster, alone)


@pytest.mark.slow
def test_pictures_in_memory_and_ids_reach_the_workers(new_store, engine, tmp_path):
    shown = tiny.pictures(6)
    shown[1].save(tmp_path / "file.png")
    rows = [
        {"image": shown[0], "id": "pil", "year": 1},
        {"image": (tmp_path / "file.png").read_bytes(), "id": "bytes", "year": 2},
        {"image": np.asarray(shown[2]), "id": "array", "year": 3},
        {"image": b"no picture", "id": "broken", "year": 4},
    ]
    on_cluster, alone = new_store("cluster"), new_store("alone")
    report = on_cluster.add(iter(rows), engine=engine)
    assert counts(report) == counts(alone.add(iter(rows))) == (3, 0, 0, 0, 1)
    assert_same(on_cluster, alone)
    rows[0]["image"] = shown[5]
    report = on_cluster.add(rows, engine=engine)
    assert counts(report) == counts(alone.add(rows)) == (0, 1, 0, 2, 1)
    assert_same(on_cluster, alone)


@pytest.mark.slow
@pytest.mark.parametrize("look_up", [1, 1000])  # pictures in one question to the table
def test_copies_in_a_round_share_the_fate_of_the_first(new_store, save_pictures, engine, monkeypatch, look_up):
    monkeypatch.setattr("fwd2bot.pipelines.store.ray_engine.LOOKUP", look_up)
    folder, paths = save_pictures(4)
    on_cluster, alone = new_store("cluster"), new_store("alone")
    for store in (on_cluster, alone):
        store.add(folder)
    # Two files change to the same content: the first has its row, and the old rows of both go.
    tiny.pictures(1, seed=7)[0].save(paths[0])
    paths[1].write_bytes(paths[0].read_bytes())
    assert counts(on_cluster.add(folder, engine=engine)) == counts(alone.add(folder)) == (0, 1, 1, 2, 0)
    assert {row[0] for row in content(on_cluster).values()} == {str(path) for path in (paths[0], *paths[2:])}
    assert_same(on_cluster, alone)

    shown = [b"no picture", paths[0].read_bytes(), b"no picture", (good := tiny.pictures(5, seed=8)[4]), good]
    report = on_cluster.add(shown, engine=engine)
    assert counts(report) == counts(alone.add(shown)) == (1, 0, 1, 1, 2)
    assert [name for name, _ in report.failed] == ["picture 0", "picture 2"]
    assert_same(on_cluster, alone)


@pytest.mark.slow
def test_strict_job_commits_what_is_good_and_names_what_is_not(new_store, save_pictures, engine):
    folder, paths = save_pictures(3)
    paths[1].write_bytes(b"no picture")
    store = new_store()
    with pytest.raises(ValueError, match=f"{paths[1].name}: "):
        store.add(folder, engine=engine, strict=True)
    assert len(store) == 2


@pytest.mark.slow
def test_rows_stay_when_their_new_ones_cannot_be_written(new_store, save_pictures, engine, monkeypatch):
    folder, _ = save_pictures(3)
    store = new_store()
    store.add(folder, metadata={"album": "one"}, engine=engine)
    before = content(store)
    monkeypatch.setattr("fwd2bot.pipelines.store.ray_engine._table_uri", lambda path: f"{path}/elsewhere.lance")
    with pytest.raises(OSError, match="does not see the store at .*elsewhere.lance. Put it where every node"):
        store.add(folder, metadata={"album": "two"}, engine=engine)
    after = content(store)
    assert {one: row[:3] for one, row in after.items()} == {one: row[:3] for one, row in before.items()}
    monkeypatch.undo()
    assert counts(store.add(folder, metadata={"album": "two"}, engine=engine)) == (0, 3, 0, 0, 0)


@pytest.mark.slow
def test_round_with_changed_files_is_one_commit(new_store, save_pictures, engine):
    folder, paths = save_pictures(6)
    store = new_store()
    store.add(folder, engine=engine)
    tiny.pictures(1, seed=7)[0].save(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())  # a copy now, so that its row goes without a new one
    version = store._table.table.version
    assert counts(store.add(folder, engine=engine)) == (0, 1, 1, 4, 0)
    assert store._table.table.version == version + 1 and len(content(store)) == 5


def test_commit_of_fragments_goes_through_beside_another_writer(new_store, monkeypatch):
    store, other = new_store(), []
    store.add_summary(torch.ones(4, 4, 32), ids=list("abcd"), sources=list("abcd"))
    uri, commit = f"{store.path}/summaries.lance", lance.LanceDataset.commit

    def slow(*args, **options):
        if not other:  # between the look-up and the commit
            other.append(store.add_summary(torch.zeros(1, 4, 32), ids=["b"], sources=["taken over"]))
        return commit(*args, **options)

    monkeypatch.setattr(lance.LanceDataset, "commit", slow)
    _commit_fragments(uri, [], [is_replaced({"a": "a", "b": "b"})])
    assert sorted(store) == ["b", "c", "d"] and store.get("b")[0]["source"] == "taken over"


def test_store_of_a_relative_path_is_found_by_the_workers(
    shared_fwd2bot, tiny_processor, engine, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store = SummaryStore.create("store", shared_fwd2bot, tiny_processor)
    assert counts(store.add(tiny.pictures(2), engine=engine)) == (2, 0, 0, 0, 0)
    assert len(content(store)) == 2


@pytest.mark.slow
def test_command_indexes_with_the_workers(save_pictures, engine, tmp_path):
    folder, _ = save_pictures(3)
    engine.connect()
    arguments = ["index", str(folder), "--store", str(tmp_path / "s"), "--engine", "ray", "--workers", "2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["added"] == 3
    assert len(content(SummaryStore.open(tmp_path / "s"))) == 3


def test_round_ends_where_pictures_in_memory_become_many(monkeypatch):
    [picture] = tiny.pictures(1)
    array = np.asarray(picture)
    monkeypatch.setattr("fwd2bot.pipelines.store.ray_engine.IN_MEMORY", 3 * array.nbytes)
    for some in ([picture] * 6, [array] * 6, [array.tobytes()] * 6, [memoryview(array)] * 6):
        assert [len(part) for part in _rounds([Item(one) for one in some], 5)] == [3, 3]
    assert [len(part) for part in _rounds([Item("file", stamp=(1, 1))] * 12, 5)] == [5, 5, 2]


@pytest.mark.parametrize(("engine", "message"), [("spark", 'choose "local"'), (3, 'choose "local"')])
def test_unknown_engine_is_refused(new_store, save_pictures, engine, message):
    with pytest.raises(ValueError, match=message):
        new_store().add(save_pictures(1)[0], engine=engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, or None, got 0"),
        ({"workers": True}, "workers .* got True"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be above 0, got 0"),
        ({"gpus_per_worker": -1}, "gpus_per_worker must be 0 or more, or None, got -1"),
    ],
)
def test_resources_of_workers_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RayEngine(**arguments)
