"""Search: by sentence, picture, summary and vector; filters, late interaction, the approximate index."""

import re
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
from transformers import pipeline

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.searching import maxsim
from fwd2bot.pipelines.store.table import StoreConfig, SummaryTable


def ids(hits) -> list[str]:
    return [hit["id"] for hit in hits]


def test_sentence_finds_what_the_retrieval_pipeline_finds(filled, shared_fwd2bot, tiny_processor):
    store, shown = filled
    pipe = pipeline("fwd2bot-retrieval", model=shared_fwd2bot, processor=tiny_processor, device="cpu")
    expected = pipe("a dog on a green field", images=shown, top_k=12)
    hits = store.search("a dog on a green field", 12)
    assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in expected], abs=2e-3)
    assert hits[0]["id"] == f"p{expected[0]['index']}"
    assert hits[0]["metadata"]["year"] == 2000 + expected[0]["index"]


@pytest.mark.parametrize("sort", ["pil", "bytes", "path", "dict", "array"])
def test_picture_finds_itself(filled, tmp_path, sort):
    store, shown = filled
    path = tmp_path / "query.png"
    shown[4].save(path)
    content = BytesIO()
    shown[4].save(content, "PNG")
    query = {
        "pil": shown[4],
        "bytes": content.getvalue(),
        "path": path,
        "dict": {"image": str(path)},
        "array": np.asarray(shown[4]),
    }[sort]
    assert ids(store.search(query, 1)) == ["p4"]


def test_summary_and_vector_find_their_picture_without_a_model(filled):
    store = SummaryStore.open(filled[0].path)
    [(_, vectors)] = store.embeddings(["p3"])
    for query in (store.summary("p3"), vectors[0], vectors[0] * 7, torch.from_numpy(vectors[0])):
        [hit] = store.search(query, 1)
        assert hit["id"] == "p3" and hit["score"] == pytest.approx(1, abs=2e-3)


def test_filter_chooses_among_metadata(filled):
    store, _ = filled
    assert set(ids(store.search("a dog", 12, where="year >= 2003 AND year < 2006"))) == {"p3", "p4", "p5"}
    assert set(ids(store.search("a dog", 3, where="maker = 'O''Hara' AND year > 2006"))) == {"p7", "p9", "p11"}
    assert store.search("a dog", where="year > 3000") == []


@pytest.mark.parametrize("where", ["year >", "colour = 'red'", "", "year = 1; DROP TABLE summaries", "year = 'x' x"])
def test_filter_that_does_not_parse_is_named_with_the_columns(filled, where):
    store, _ = filled
    with pytest.raises(ValueError, match=f"The filter '?\"?{re.escape(where[:4])}.*on the columns id, hash, .*, year"):
        store.search("a dog", where=where)
    assert len(store) == 12


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("", "Expected: an expression, found: its end"),
        ("year >", "Expected: an expression, found: its end"),
        ("(year > 2000", "Expected: ), found: EOF"),
        ("year = 'x' y", "Expected: ), found: y"),
        ("yaer > 2000", "No field named yaer"),
        ("year", "The filter year does not return a boolean"),
        ("year > 'abc'", "Received literal Utf8(\"abc\") and could not convert to literal of type 'Int64'"),
        ("maker = 'x", "Unterminated string literal at Line: 1, Column: 10"),
        ("1 / (year - 2003) > 0", "Divide by zero error"),
    ],
)
def test_error_of_a_filter_says_what_is_wrong_and_no_more(filled, where, reason):
    with pytest.raises(ValueError) as error:
        filled[0].search("a dog", where=where)
    columns = "id, hash, source, page, size, mtime_ns, length, added, year, maker"
    assert str(error.value) == (
        f"The filter {where!r} cannot be used: {reason}. It is a condition in SQL on the columns {columns}; words "
        "stand in single quotes."
    )


def test_filter_that_fails_while_it_runs_is_named_without_paths_of_the_library(filled):
    for where in ("1 / (year - 2003) > 0", "year = 'abc'"):
        with pytest.raises(ValueError, match="cannot be used: .* on the columns id, hash") as error:
            filled[0].search("a dog", where=where)
        assert ".rs" not in str(error.value) and ".cargo" not in str(error.value)


def test_new_rows_are_found_at_once_by_a_store_that_was_open(filled):
    store, _ = filled
    reader = SummaryStore.open(store.path)
    assert len(reader) == 12
    [shown] = tiny.pictures(1, seed=5)
    store.add([shown], ids=["new"])
    assert len(reader) == 13
    assert ids(reader.search(store.summary("new"), 1)) == ["new"]


def test_maxsim_is_the_mean_of_the_best_cosines():
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, -1.0], [-5.0, 0.0]]])
    assert maxsim(query, tokens).tolist() == pytest.approx([(1 + 0.5**0.5) / 2, 0])


def test_rerank_orders_the_candidates_by_late_interaction(filled, shared_fwd2bot, tiny_processor):
    store, _ = filled
    names = [f"p{index}" for index in range(12)]
    query = shared_fwd2bot.compress(**tiny_processor.process_texts(["a dog"])).tokens[0]
    scores = maxsim(query, store.summary(names).tokens)
    hits = store.search("a dog", 4, rerank="maxsim", candidates=12)
    best = scores.argsort(descending=True)[:4]
    assert ids(hits) == [names[index] for index in best]
    assert [hit["score"] for hit in hits] == pytest.approx(scores[best].tolist(), abs=1e-4)
    narrow = store.search("a dog", 2, rerank="maxsim", candidates=2)
    assert set(ids(narrow)) == set(ids(store.search("a dog", 2)))


@pytest.mark.parametrize(
    ("query", "options", "error", "message"),
    [
        ("a dog", {"top_k": 0}, ValueError, "top_k must be an integer of at least 1, got 0"),
        ("a dog", {"candidates": 1.5}, ValueError, "candidates must be an integer"),
        ("a dog", {"rerank": "magic"}, ValueError, "rerank='magic' is unknown"),
        ("a dog", {"where": 3}, TypeError, "where must be an SQL filter"),
        ("a dog", {"approximate": True}, ValueError, r"no approximate index. Make one with build_index\(\)"),
        (" ", {}, ValueError, "The text is empty"),
        (5, {}, TypeError, "A query must be a sentence"),
        (np.ones(31, np.float32), {}, ValueError, "must have 32 numbers, .* got 31"),
        (np.zeros(32, np.float32), {}, ValueError, "all zeros"),
        (np.full(32, np.nan, np.float32), {}, ValueError, "NaN"),
        (np.ones(32, np.float32), {"rerank": "maxsim"}, ValueError, "of which a vector has none"),
        (torch.randn(2, 4, 32), {}, ValueError, "must be that of one picture, got 2"),
        (torch.randn(1, 3, 32), {}, ValueError, "A summary has 3 token"),
        ("x" * 100_000, {}, ValueError, "the model reads 512. Shorten it"),
    ],
)
def test_what_cannot_be_searched_is_refused(filled, query, options, error, message):
    with pytest.raises(error, match=message):
        filled[0].search(query, **options)


def test_search_in_an_empty_store_finds_nothing(store):
    assert store.search("a dog") == [] and list(store) == [] and list(store.embeddings()) == []


@pytest.fixture(scope="module")
def large(shared_fwd2bot, tiny_processor, tmp_path_factory):
    """A store of 1200 rows in clusters, and 40 queries near rows. Shared by the module: do not change it."""
    store = SummaryStore.create(
        tmp_path_factory.mktemp("large") / "store", shared_fwd2bot, tiny_processor, num_summary_tokens=1
    )
    random = np.random.default_rng(0)
    centres = random.standard_normal((30, 32))
    rows = centres[random.integers(0, 30, 1200)] + 0.4 * random.standard_normal((1200, 32))
    store.add_summary(torch.from_numpy(rows)[:, None], ids=[str(index) for index in range(1200)])
    return store, rows[:40] + 0.2 * random.standard_normal((40, 32))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ivf_pq", {"num_partitions": 4, "num_sub_vectors": 8, "max_iterations": 5}),
        ("hnsw_sq", {"num_partitions": 1, "ef_construction": 60}),
    ],
)
def test_approximate_index_finds_most_of_what_the_exact_search_finds(large, kind, settings):
    store, queries = large
    store.build_index(kind, **settings)
    stats = store.stats()["index"]
    assert stats["indexed_rows"] == 1200 and stats["unindexed_rows"] == 0
    found = 0
    for query in queries:
        exact = ids(store.search(query, 10, approximate=False))
        assert exact == ids(store.search(query, 10))  # a store of this size is searched exactly
        approximate = store.search(query, 10, approximate=True)
        assert [hit["score"] for hit in approximate] == sorted((hit["score"] for hit in approximate), reverse=True)
        found += len(set(exact) & set(ids(approximate)))
    assert found / (10 * len(queries)) >= 0.9


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """A store of 12,000 rows whose index has over 20 partitions, and a query. Do not change it."""
    made = dict.fromkeys(("model", "revision", "fingerprint", "prompt", "text_prompt", "dtype"))
    path = tmp_path_factory.mktemp("partitioned") / "store"
    SummaryTable.create(path, StoreConfig(**made, num_summary_tokens=1, width=16, codec="int8"))
    store, random = SummaryStore.open(path), np.random.default_rng(0)
    rows = torch.from_numpy(random.standard_normal((12_000, 1, 16)))
    names = [str(index) for index in range(len(rows))]
    store.add_summary(rows, ids=names, metadata=[{"n": index} for index in range(len(rows))])
    store.build_index(num_partitions=45, max_iterations=2)
    return store, random.standard_normal(16).astype(np.float32)


@pytest.mark.parametrize(("where", "count"), [("n = 17", 1), ("n < 5", 5), ("n < 40 AND n > 33", 6)])
def test_narrow_filter_finds_by_the_index_what_is_found_without(partitioned, where, count):
    store, query = partitioned
    exact = ids(store.search(query, 8, where=where, approximate=False))
    assert len(exact) == count
    assert ids(store.search(query, 8, where=where, approximate=True)) == exact


@pytest.mark.parametrize("top_k", [2_000, 12_000, 2**31, 2**40, 2**70])
def test_large_top_k_is_answered_in_full_in_spite_of_the_index(partitioned, top_k):
    store, query = partitioned
    hits = store.search(query, top_k, approximate=True)
    assert len(hits) == min(top_k, 12_000) and ids(hits) == ids(store.search(query, top_k, approximate=False))


def test_index_needs_rows_to_learn_from_and_a_known_kind(filled):
    store, _ = filled
    with pytest.raises(ValueError, match="at least 256 rows to learn from, not 12"):
        store.build_index()
    with pytest.raises(ValueError, match="kind='flat' is unknown; choose one of 'ivf_pq', 'hnsw_sq'"):
        store.build_index("flat")
