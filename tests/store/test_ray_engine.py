"""The indexing job on a Ray cluster of two workers, started for these tests on this machine."""

import numpy as np
import pytest
import tiny

from fwd2bot.pipelines.store import SummaryStore

pytest.importorskip("lance_ray", reason="the extra 'ray' is not installed")

from fwd2bot.pipelines.store.ray_engine import RayEngine  # noqa: E402  (after the check)


@pytest.fixture(scope="module")
def engine():
    import ray

    yield RayEngine(workers=2)
    ray.shutdown()


def counts(report) -> tuple[int, int, int, int, int]:
    return report.added, report.updated, report.duplicates, report.skipped, len(report.failed)


def content(store: SummaryStore) -> dict[str, tuple]:
    """By id: source, metadata, tokens, embedding."""
    ids = sorted(store)
    [(found, embeddings)] = store.embeddings(ids)
    assert found == ids
    rows = store.get(ids)
    tokens = store.summary(ids).tokens.numpy()
    return {
        row["id"]: (row["source"], row["hash"], row["metadata"], one.tolist(), embedding.tolist())
        for row, one, embedding in zip(rows, tokens, embeddings, strict=True)
    }


def assert_same(store: SummaryStore, other: SummaryStore) -> None:
    found, wanted = content(store), content(other)
    assert sorted(found) == sorted(wanted)
    for one in wanted:
        assert found[one][:3] == wanted[one][:3]
        np.testing.assert_allclose(found[one][3], wanted[one][3], atol=2e-3)
        np.testing.assert_allclose(found[one][4], wanted[one][4], atol=2e-3)


def test_cluster_fills_a_store_as_one_process_does_and_goes_on_where_it_was(new_store, save_pictures, engine):
    folder, paths = save_pictures(11)
    (folder / "copy.png").write_bytes(paths[3].read_bytes())
    (folder / "broken.png").write_bytes(paths[4].read_bytes()[:40])
    on_cluster, alone = new_store("cluster"), new_store("alone")
    shared = {"metadata": {"album": "drawn"}, "batch_size": 3}

    first = on_cluster.add(folder, engine=engine, commit_every=8, **shared)
    assert counts(first) == counts(alone.add(folder, **shared)) == (11, 0, 1, 0, 1)
    assert first.failed[0][0].endswith("broken.png") and "cannot" in first.failed[0][1]
    assert_same(on_cluster, alone)
    [hit] = on_cluster.search(paths[5], top_k=1, where="album = 'drawn'")
    assert hit["source"] == str(paths[5])

    # Run again: a changed file, a new one, and one that is whole now.
    tiny.pictures(1, seed=7)[0].save(paths[0])
    tiny.pictures(1, seed=8)[0].save(folder / "new.png")
    tiny.pictures(1, seed=9)[0].save(folder / "broken.png")
    again = on_cluster.add(folder, engine=engine, **shared)
    assert counts(again) == counts(alone.add(folder, **shared)) == (2, 1, 1, 10, 0)
    assert_same(on_cluster, alone)


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


def test_strict_job_commits_what_is_good_and_names_what_is_not(new_store, save_pictures, engine):
    folder, paths = save_pictures(3)
    paths[1].write_bytes(b"no picture")
    store = new_store()
    with pytest.raises(ValueError, match=f"{paths[1].name}: "):
        store.add(folder, engine=engine, strict=True)
    assert len(store) == 2


@pytest.mark.parametrize(("engine", "message"), [("spark", 'choose "local"'), (3, 'choose "local"')])
def test_unknown_engine_is_refused(new_store, save_pictures, engine, message):
    with pytest.raises(ValueError, match=message):
        new_store().add(save_pictures(1)[0], engine=engine)


def test_number_of_workers_is_checked():
    with pytest.raises(ValueError, match="at least 1, or None, got 0"):
        RayEngine(workers=0)
