"""The approximate indices, with the settings that they have by default, against the exact search."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.searching import nearest
from fwd2bot.pipelines.store.table import StoreConfig, SummaryTable

ROWS, WIDTH = 3000, 32


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """A store of 3000 rows in 30 clusters, a tenth of them of each year, and 40 queries near rows."""
    made_by = dict.fromkeys(("model", "revision", "fingerprint", "prompt", "text_prompt", "dtype"))
    config = StoreConfig(**made_by, num_summary_tokens=1, width=WIDTH, codec="int4")
    path = tmp_path_factory.mktemp("clustered") / "store"
    SummaryTable.create(path, config).add_columns({"year": pa.int32()})
    store, rng = SummaryStore.open(path), np.random.default_rng(0)
    centres = rng.standard_normal((30, WIDTH))
    rows = centres[rng.integers(0, 30, ROWS)] + 0.4 * rng.standard_normal((ROWS, WIDTH))
    years = [{"year": 2000 + index % 10} for index in range(ROWS)]
    store.add_summary(torch.from_numpy(rows)[:, None], ids=[str(index) for index in range(ROWS)], metadata=years)
    return store, rows[:40] + 0.2 * rng.standard_normal((40, WIDTH))


def recall(store, queries, **options) -> float:
    """Share of the exact search's best 10 that the index finds."""
    found = 0
    for query in queries:
        exact, approximate = (
            {hit["id"] for hit in store.search(query, 10, approximate=value, **options)} for value in (False, True)
        )
        assert len(approximate) == 10
        found += len(exact & approximate)
    return found / (10 * len(queries))


@pytest.mark.parametrize("kind", ["ivf_pq", "hnsw_sq"])
def test_index_with_default_settings_finds_what_the_exact_search_finds(clustered, kind):
    store, queries = clustered
    store.build_index(kind)
    assert recall(store, queries) >= 0.95
    assert recall(store, queries, where="year = 2003") >= 0.95


def test_comparing_candidates_anew_is_what_makes_a_coarse_index_exact_enough(clustered):
    store, queries = clustered
    store.build_index("ivf_pq")
    table = SummaryTable.open(store.path)
    found = {1: 0, 10: 0}
    for query in queries:
        query = (query / np.linalg.norm(query)).astype(np.float32)
        exact = set(nearest(table, query, ["id"], 10, None, False)["id"].to_pylist())
        for refine in found:
            ids = nearest(table, query, ["id"], 10, None, True, refine=refine)["id"].to_pylist()
            found[refine] += len(exact & set(ids))
    assert found[10] >= found[1] + 40  # of 400
