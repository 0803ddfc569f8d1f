"""`fwd2bot-retrieval` in a store."""

import sys

import pytest
import tiny
from transformers import pipeline

from fwd2bot.pipelines.store import SummaryStore


@pytest.fixture
def search(vivid_fwd2bot, tiny_processor, picture_store):
    return pipeline(
        "fwd2bot-retrieval", model=vivid_fwd2bot, processor=tiny_processor, store=picture_store, device="cpu"
    )


def close(hits):
    return [{**hit, "score": pytest.approx(hit["score"], abs=1e-5)} for hit in hits]


def test_hits_are_those_of_the_store(search, picture_store):
    hits = search("a dog", top_k=2)
    assert hits == close(picture_store.search("a dog", top_k=2))
    assert hits[0]["id"] and hits[0]["source"].endswith(".png")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_several_queries_of_every_sort(search, picture_store, pictures, batch_size):
    queries = ["a dog", pictures(6)[2], picture_store.summary("p4")]
    found = search(queries, batch_size=batch_size)
    assert found == [close(picture_store.search(query)) for query in queries]
    assert [hits[0]["id"] for hits in found[1:]] == ["p2", "p4"]
    stream = search(query for query in queries)
    assert not isinstance(stream, list)
    assert list(stream) == [close(hits) for hits in found]


def test_filter_and_number_of_hits(search):
    assert {hit["id"] for hit in search("a dog", where="year >= 2004")} == {"p4", "p5"}
    assert len(search("a dog")) == 5
    assert len(search("a dog", top_k=None)) == 6


def test_text_stage_searches_by_sentences(checkpoint, tmp_path):
    load = {"model": str(checkpoint), "device": "cpu"}
    whole = pipeline("fwd2bot-compress", **load)
    store = SummaryStore.create(tmp_path / "store", whole.model, whole.processor, num_summary_tokens=3)
    store.add(tiny.pictures(3), ids=["a", "b", "c"])
    search = pipeline("fwd2bot-retrieval", store=tmp_path / "store", model_kwargs={"stage": "text"}, **load)
    assert search("a dog") == close(store.search("a dog"))
    with pytest.raises(ValueError, match="stage='text'"):
        search(tiny.pictures(1)[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"texts": ["a"]}, "searches SummaryStore.*Leave out texts"),
        ({"num_summary_tokens": 2}, "have 4 tokens, not 2"),
        ({"where": "no filter at all"}, "filter 'no filter at all' cannot be used"),
    ],
)
def test_what_a_store_cannot_do_is_refused(search, options, message):
    with pytest.raises(ValueError, match=message):
        search("a dog", **options)


def test_filter_without_a_store_is_refused(retrieval):
    with pytest.raises(ValueError, match="where filters the rows of a store"):
        retrieval("a dog", texts=["a"], where="year > 2000")


@pytest.mark.parametrize(
    "store, error, message",
    [(3, TypeError, "path of one, got int"), ("nowhere", FileNotFoundError, "nowhere holds no store")],
)
def test_what_is_no_store_is_refused(vivid_fwd2bot, tiny_processor, store, error, message):
    with pytest.raises(error, match=message):
        pipeline("fwd2bot-retrieval", model=vivid_fwd2bot, processor=tiny_processor, store=store, device="cpu")


def test_store_of_another_model_is_refused(tiny_processor, picture_store):
    with pytest.raises(ValueError, match="was made by another model"):
        pipeline(
            "fwd2bot-retrieval",
            model=tiny.tiny_fwd2bot(5),
            processor=tiny_processor,
            store=picture_store,
            device="cpu",
        )


def test_without_lancedb_only_the_store_is_missing(vivid_fwd2bot, tiny_processor, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fwd2bot.pipelines.store")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lancedb", None)  # an import of it fails
    load = {"model": vivid_fwd2bot, "processor": tiny_processor, "device": "cpu"}
    assert pipeline("fwd2bot-retrieval", **load)("a dog", texts=["a dog", "cats"])[0]["index"] == 0
    with pytest.raises(ImportError, match=r'pip install "fwd2bot\[store\]"'):
        pipeline("fwd2bot-retrieval", store="pictures.store", **load)


@pytest.mark.parametrize("name", ["in_store", "candidates"])
def test_what_the_pipeline_hands_to_itself_is_no_argument(retrieval, search, name):
    for pipe, given in ((retrieval, {"texts": ["a", "b"]}), (search, {})):
        with pytest.raises(TypeError, match=f"has no argument '{name}'"):
            pipe("a dog", **given, **{name: True})


def test_all_rows_are_ranked_in_spite_of_an_index(search, monkeypatch):
    asked = []
    monkeypatch.setattr(search.store, "search", lambda *args, **options: asked.append((args[1:], options)) or [])
    search("a dog", top_k=None)
    assert asked == [((len(search.store),), {"where": None, "approximate": False})]
