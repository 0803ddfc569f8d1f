"""Create, open, read, delete: what a store gives back, and whom it refuses."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.codecs import error_bound
from fwd2bot.pipelines.store.table import is_in

SIX = [f"p{index}" for index in range(6)]


def test_opened_store_gives_back_what_the_model_compressed(filled, shared_fwd2bot, tiny_processor):
    store, shown = filled
    made = shared_fwd2bot.compress(**tiny_processor.process_images(shown))
    found = SummaryStore.open(store.path).summary([f"p{index}" for index in range(12)])
    assert torch.allclose(found.tokens, made.tokens, atol=2e-3)
    assert found.metadata == made.metadata
    [(ids, vectors)] = store.embeddings()
    order = [int(one[1:]) for one in ids]
    assert np.allclose(vectors, shared_fwd2bot.embed(summary=made)[order], atol=1e-3)


def test_fp16_summaries_come_back_exactly(store, shared_fwd2bot):
    tokens = torch.randn(5, 4, 32).half()
    store.add_summary(Fwd2BotSummary(tokens), ids=list("abcde"))
    assert (store.summary(["e", "a"]).tokens == tokens[[4, 0]].float()).all()
    assert shared_fwd2bot.embed(summary=store.summary(["a"])).shape == (1, 32)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_coarser_codecs_come_back_within_their_bound(new_store, codec):
    tokens = torch.randn(3, 4, 32)
    store = new_store(codec=codec)
    store.add_summary(tokens, ids=list("abc"))
    error = np.abs(store.summary(list("abc")).tokens.numpy() - tokens.numpy())
    assert (error <= error_bound(tokens.numpy(), codec)).all() and error.max() > 0


def test_shorter_store_holds_the_first_tokens(new_store, filled):
    long, shown = filled
    short = new_store("short", num_summary_tokens=2)
    short.add(shown[:6], ids=SIX)
    assert torch.allclose(short.summary(SIX).tokens, long.summary(SIX).tokens[:, :2], atol=2e-3)
    again = new_store("again", num_summary_tokens=2)
    again.add_summary(long.summary(SIX), ids=SIX)
    assert torch.equal(again.summary(SIX).tokens, long.summary(SIX).tokens[:, :2])


def test_rows_come_in_the_order_that_was_asked_for(filled):
    store, _ = filled
    before = datetime.now(UTC)
    rows = store.get(["p3", "p1", "p3"])
    assert [row["id"] for row in rows] == ["p3", "p1", "p3"]
    assert rows[1]["metadata"] == {"year": 2001, "maker": "O'Hara"}
    assert rows[0]["length"] == 4 and len(rows[0]["hash"]) == 64 and rows[0]["page"] is None
    assert before - timedelta(minutes=5) < rows[0]["added"] <= before
    assert set(store) == {f"p{index}" for index in range(12)} and len(store) == 12


def test_embeddings_of_some(filled):
    store, _ = filled
    [(ids, vectors)] = store.embeddings(["p4", "p2"])
    assert ids == ["p4", "p2"] and vectors.shape == (2, 32) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("method", ["get", "summary", "delete"])
def test_unknown_ids_are_listed_and_nothing_is_done(filled, method):
    store, _ = filled
    with pytest.raises(ValueError, match="Not in the store .*'x', \"y'z\""):
        getattr(store, method)(["p1", "x", "y'z"])
    assert len(store) == 12


def test_delete_takes_the_rows_away(filled):
    store, _ = filled
    store.delete("p1")
    store.delete(["p2", "p3"])
    assert set(store) == {f"p{index}" for index in (0, *range(4, 12))}
    assert all(hit["id"] not in ("p1", "p2", "p3") for hit in store.search("a dog", 20))


def test_purge_frees_the_bytes_of_a_single_row_at_once(new_store):
    store = new_store()
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 4, 32)))
    for start in (0, 100, 200):
        store.add_summary(rows[start : start + 100], ids=[f"r{start + index}" for index in range(100)])
    kept = store.summary(["r150"]).tokens
    gone = store.summary(["r5"]).tokens.numpy().astype(np.float16).tobytes()
    store.optimize(older_than=timedelta(0))
    assert holds(store.path, gone)
    size = store.stats()["bytes"]
    store.delete(["r5"], purge=True)
    assert not holds(store.path, gone)
    store.delete([f"r{index}" for index in range(200, 300)], purge=True)
    assert store.stats()["bytes"] < 0.75 * size
    assert len(store) == 199 and torch.equal(store.summary(["r150"]).tokens, kept)


def holds(folder, content: bytes) -> bool:
    return any(content in path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


def test_deleted_bytes_stay_until_optimize_and_rows_survive_it(filled):
    store, _ = filled
    before = store.summary(["p7"]).tokens
    store.delete([f"p{index}" for index in range(6)])
    size = store.stats()["bytes"]
    store.optimize(older_than=timedelta(0), leftovers=True)
    assert store.stats()["bytes"] < size
    assert torch.equal(store.summary(["p7"]).tokens, before) and len(store) == 6


def test_stats_tell_rows_bytes_and_maker(filled, shared_fwd2bot):
    store, _ = filled
    stats = store.stats()
    assert stats["rows"] == 12 and stats["codec"] == "fp16" and stats["num_summary_tokens"] == 4
    assert stats["bytes_by_column"] == {"embedding": 64, "tokens": 256}
    assert stats["bytes_per_image"] == stats["bytes"] / 12 > 320
    assert stats["fingerprint"] == shared_fwd2bot.fingerprint and stats["index"] is None
    assert stats["metadata"] == {"year": "int64", "maker": "string"}


def test_upsert_replaces_summary_and_metadata_of_an_id(filled):
    store, shown = filled
    report = store.add([shown[5]], ids=["p1"], metadata={"year": 1990})
    assert (report.added, report.updated) == (0, 1) and len(store) == 12
    assert torch.allclose(store.summary(["p1"]).tokens, store.summary(["p5"]).tokens, atol=2e-3)
    assert store.get(["p1"])[0]["metadata"] == {"year": 1990, "maker": None}


def test_model_of_other_weights_is_refused_by_name(filled, tiny_processor):
    store, _ = filled
    other = tiny.tiny_fwd2bot(seed=3)
    with pytest.raises(ValueError, match="was made by another model: .*fingerprint is") as error:
        SummaryStore.open(store.path, other, tiny_processor)
    assert other.fingerprint in str(error.value) and store.config.fingerprint in str(error.value)


def test_model_of_another_prompt_is_refused(filled):
    store, _ = filled
    model, processor = tiny.tiny_fwd2bot(), tiny.tiny_processor()
    model.config.image_prompt = processor.image_prompt = "Say it."
    with pytest.raises(ValueError, match="image prompt is .* with 'Say it.'"):
        SummaryStore.open(store.path, model, processor)


def test_summaries_of_another_model_are_refused(store):
    other = Fwd2BotSummary(torch.randn(1, 4, 32), metadata={"fingerprint": "feed", "model": "other"})
    with pytest.raises(ValueError, match="its fingerprint is 'feed'"):
        store.add_summary(other, ids=["a"])
    with pytest.raises(ValueError, match="A summary has 2 token"):
        store.add_summary(torch.randn(1, 2, 32), ids=["a"])
    with pytest.raises(ValueError, match="16 wide, those of the store 32"):
        store.add_summary(torch.randn(1, 4, 16), ids=["a"])
    assert len(store) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": ["a"]}, "2 summaries came with 1 ids"),
        ({"ids": ["a", "a"]}, "not all different"),
        ({"ids": ["a", ""]}, "An id must be a str that is not empty"),
        ({"ids": ["a", "b"], "metadata": [{}]}, "2 summaries came with 1 metadata"),
        ({"ids": ["a", "b"], "metadata": {"hash": 1}}, "'hash' cannot be the name of metadata"),
    ],
)
def test_summaries_with_wrong_ids_or_metadata_are_refused(store, arguments, message):
    with pytest.raises(ValueError, match=message):
        store.add_summary(torch.randn(2, 4, 32), **arguments)
    assert len(store) == 0


def test_summary_with_nan_is_refused(store):
    with pytest.raises(ValueError, match="NaN"):
        store.add_summary(torch.full((1, 4, 32), torch.nan), ids=["a"])


def test_store_of_longer_summaries_than_the_model_has_is_refused(shared_fwd2bot, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="num_summary_tokens"):
        SummaryStore.create(tmp_path / "long", shared_fwd2bot, tiny_processor, num_summary_tokens=5)


def test_create_opens_a_store_of_its_own_kind_alone(filled, shared_fwd2bot, tiny_processor):
    store, _ = filled
    with pytest.raises(FileExistsError, match="holds a store. Open it"):
        SummaryStore.create(store.path, shared_fwd2bot, tiny_processor)
    again = SummaryStore.create(store.path, shared_fwd2bot, tiny_processor, codec="fp16", exist_ok=True)
    assert len(again) == 12
    with pytest.raises(ValueError, match="made with codec='fp16', not 'int4'"):
        SummaryStore.create(store.path, shared_fwd2bot, tiny_processor, codec="int4", exist_ok=True)


def test_without_a_model_pictures_and_sentences_are_refused(filled):
    store = SummaryStore.open(filled[0].path)
    with pytest.raises(ValueError, match="opened without a model, which is needed to add pictures"):
        store.add(filled[1])
    with pytest.raises(ValueError, match="opened without a model, which is needed to search by a sentence"):
        store.search("a dog")


def test_store_in_which_codes_were_written_by_compress_stage_is_searched_by_text_stage(tmp_path, tiny_processor):
    folder = tmp_path / "checkpoint"
    tiny.tiny_fwd2bot().save_pretrained(folder)
    load = type(tiny.tiny_fwd2bot()).from_pretrained
    store = SummaryStore.create(tmp_path / "s", load(folder, stage="compress"), tiny_processor)
    store.add(tiny.pictures(3))
    reader = SummaryStore.open(store.path, load(folder, stage="text"), tiny_processor)
    assert len(reader.search("a dog")) == 3
    with pytest.raises(ValueError, match="loaded with stage='text' and cannot add pictures"):
        reader.add(tiny.pictures(1))
    with pytest.raises(ValueError, match="loaded with stage='generate' and cannot search by a sentence"):
        SummaryStore.open(store.path, load(folder, stage="generate"), tiny_processor).search("a dog")


def test_model_in_training_mode_is_refused(store):
    model = tiny.tiny_fwd2bot().train()
    trained = SummaryStore.open(store.path, model, tiny.tiny_processor())
    with pytest.raises(ValueError, match="training mode"):
        trained.add(tiny.pictures(1))


def test_filters_quote_what_they_are_given():
    assert is_in("id", ["a'b", "c"]) == "(id IN ('a''b', 'c'))"


def test_look_ups_by_index_find_old_and_new_rows(filled, monkeypatch):
    store, shown = filled
    monkeypatch.setattr("fwd2bot.pipelines.store.table.INDEXED_ROWS", 10)
    store.optimize()
    indexed = {column for index in store._table.table.list_indices() for column in index.columns}
    assert indexed == {"id", "source"}
    store.add(tiny.pictures(1, seed=7), ids=["new"])
    store.delete("p3", purge=True)
    assert [row["id"] for row in store.get(["new", "p4"])] == ["new", "p4"]
    assert store.add(shown[4:6], ids=["p4", "p5"], metadata=[{"year": 2004}, {"year": 2005}]).skipped == 2
    assert len(store) == 12


def raw_tokens(store, one) -> bytes:
    return store._table.find("id", [one], ["tokens"])[0]["tokens"]


def test_purge_frees_the_bytes_of_a_replaced_row_too(store):
    shown = tiny.pictures(40)
    store.add(shown[:30], ids=[f"p{index}" for index in range(30)])
    first = raw_tokens(store, "p3")
    store.add([shown[35]], ids=["p3"])
    second = raw_tokens(store, "p3")
    assert holds(store.path, first) and holds(store.path, second) and first != second
    store.delete("p3", purge=True)
    assert not holds(store.path, first) and not holds(store.path, second)
    assert len(store) == 29 and store.check() == 29


def test_purge_frees_what_an_earlier_delete_left(store):
    store.add(tiny.pictures(30), ids=[f"p{index}" for index in range(30)])
    gone = raw_tokens(store, "p29")  # the last of its file
    store.delete("p29")
    store.optimize(older_than=timedelta(0))
    assert holds(store.path, gone)
    store.delete("p1", purge=True)
    assert not holds(store.path, gone) and len(store) == 28


def test_purge_leaves_no_trace_of_the_id(store):
    for index, picture in enumerate(tiny.pictures(3)):
        store.add(picture, ids=f"unique-{index}")  # a file of its own each
    for index in (1, 0, 2):
        store.delete(f"unique-{index}", purge=True)
        assert not holds(store.path, f"unique-{index}".encode())
    assert len(store) == 0


def test_interrupted_purge_is_finished_by_the_same_call(store, monkeypatch, caplog):
    store.add(tiny.pictures(20), ids=[f"p{index}" for index in range(20)])
    gone = raw_tokens(store, "p3")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._table, "optimize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.delete("p3", purge=True)
    assert holds(store.path, gone)
    store.delete("p3", purge=True)
    assert not holds(store.path, gone) and len(store) == 19


def test_reader_whose_version_a_purge_removes_is_told_to_open_the_store_anew(filled):
    store, _ = filled
    reading = store._table.snapshot()
    SummaryStore.open(store.path).delete("p3", purge=True)
    with pytest.raises(OSError, match="is missing. A purge or optimize of another .*: open the store anew"):
        list(store._table.scan(["id"], table=reading))
    assert len(list(SummaryStore.open(store.path))) == 11


def test_purge_beside_a_writer_goes_through(store):
    store.add_summary(torch.ones(60, 4, 32), ids=[f"r{index}" for index in range(60)])
    errors, ended = [], threading.Event()

    def write():
        for value in range(2, 10):
            for attempt in range(20):  # a purge may remove the version that is read: open anew
                try:
                    summary = torch.full((10, 4, 32), float(value))
                    SummaryStore.open(store.path).add_summary(summary, ids=[f"r{index}" for index in range(50, 60)])
                    break
                except OSError as error:
                    if attempt == 19:
                        errors.append(error)
        ended.set()

    writer, purged = threading.Thread(target=write), 0
    writer.start()
    while purged == 0 or (not ended.is_set() and purged < 40):
        store.delete(f"r{purged}", purge=True)
        purged += 1
    writer.join()
    assert not errors
    assert set(store) == {f"r{index}" for index in range(purged, 60)}
    assert (store.summary([f"r{index}" for index in range(50, 60)]).tokens == 9).all()


def test_store_knows_which_ids_it_has(filled):
    store, _ = filled
    assert "p3" in store and "p33" not in store and 3 not in store


def test_create_that_another_process_overtakes_opens_its_store(filled, shared_fwd2bot, tiny_processor, monkeypatch):
    store, _ = filled
    places = [f"fwd2bot.pipelines.store.{module}.exists" for module in ("table", "summary_store")]

    def create(**options):
        asked = []

        def late(path):
            asked.append(path)
            return len(asked) > (2 if options else 1)  # after it was looked whether one is there

        with monkeypatch.context() as patch:
            for place in places:
                patch.setattr(place, late)
            return SummaryStore.create(store.path, shared_fwd2bot, tiny_processor, codec="fp16", **options)

    assert len(create(exist_ok=True)) == 12
    with pytest.raises(FileExistsError, match="holds a store"):
        create()
