"""`fwd2bot-retrieval`: the ranking, what a query may be, and what is remembered of the candidates."""

import os
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from transformers import pipeline

QUERY = "a dog on a green field"
TOLERANCE = 1e-5


@pytest.fixture
def paths(pictures, tmp_path):
    """Five pictures as files."""
    files = [tmp_path / f"{index}.png" for index in range(5)]
    for path, picture in zip(files, pictures(5), strict=True):
        picture.save(path)
    return files


def indices(hits):
    return [hit["index"] for hit in hits]


def by_hand(query, candidates):
    """Score and index of every candidate `(N, d)` for a query `(1, d)`, best first."""
    scores = [float(sum(a * b for a, b in zip(query[0].tolist(), one, strict=True))) for one in candidates.tolist()]
    return sorted(((score, index) for index, score in enumerate(scores)), key=lambda pair: -pair[0])


def test_ranking_is_by_cosine_best_first(retrieval, vivid_fwd2bot, tiny_processor, pictures):
    images = vivid_fwd2bot.embed(**tiny_processor.process_images(pictures(5)))
    expected = by_hand(vivid_fwd2bot.embed(**tiny_processor.process_texts([QUERY])), images)
    hits = retrieval(QUERY, images=pictures(5))
    assert indices(hits) == [index for _, index in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([score for score, _ in expected], abs=TOLERANCE)


def test_ranking_of_given_embeddings(retrieval):
    candidates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    hits = retrieval.postprocess(torch.tensor([1.0, 0.0]), candidates=candidates, top_k=3)
    assert hits == [
        {"score": 1.0, "index": 1},
        {"score": 1.0, "index": 3},  # equal scores in the order of the candidates
        {"score": pytest.approx(0.6), "index": 2},
    ]


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (100, 7), (None, 7)])
def test_top_k_limits_the_hits(retrieval, pictures, top_k, count):
    assert len(retrieval(QUERY, images=pictures(7), top_k=top_k)) == count


def test_five_hits_by_default(retrieval, pictures):
    assert len(retrieval(QUERY, images=pictures(7))) == 5


def test_several_queries_give_a_list_of_rankings(retrieval, pictures):
    several = retrieval([QUERY, "two cats"], images=pictures(4))
    assert several == [retrieval(QUERY, images=pictures(4)), retrieval("two cats", images=pictures(4))]


def test_queries_of_a_generator_give_an_iterator(retrieval, pictures):
    rankings = retrieval((text for text in (QUERY, "two cats")), images=pictures(4), batch_size=2)
    assert [indices(hits) for hits in rankings] == [
        indices(hits) for hits in retrieval([QUERY, "two cats"], images=pictures(4))
    ]


def test_summary_ranks_as_its_pictures_do(retrieval, compress, pictures):
    summary = compress(pictures(5))
    for given in (summary, summary.tokens):
        hits = retrieval(QUERY, summary=given)
        expected = retrieval(QUERY, images=pictures(5))
        assert indices(hits) == indices(expected)
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in expected], abs=TOLERANCE)


def test_length_of_the_query_follows_the_summary(retrieval, compress, vivid_fwd2bot, tiny_processor, pictures):
    summary = compress(pictures(5), num_summary_tokens=2)
    query = vivid_fwd2bot.embed(**tiny_processor.process_texts([QUERY]), num_summary_tokens=2)
    expected = by_hand(query, vivid_fwd2bot.embed(summary=summary))
    assert indices(retrieval(QUERY, summary=summary)) == [index for _, index in expected]


def test_summaries_of_several_lengths_need_a_length(retrieval, compress, pictures):
    long, short = compress(pictures(3)), compress(pictures(2), num_summary_tokens=2)
    mixed = type(long).cat([long, short])
    with pytest.raises(ValueError, match=r"lengths \[2, 4\].*at most 2"):
        retrieval(QUERY, summary=mixed)
    hits = retrieval(QUERY, summary=mixed, num_summary_tokens=2)
    again = retrieval(QUERY, summary=type(long).cat([long.truncate(2), short]))
    assert hits == again


def test_picture_finds_itself_and_text_finds_itself(retrieval, paths, pictures):
    for query in (paths[3], pictures(5)[3], paths[3].read_bytes(), {"image": str(paths[3])}):
        hits = retrieval(query, images=pictures(5))
        assert hits[0]["index"] == 3
        assert hits[0]["score"] == pytest.approx(1, abs=TOLERANCE)
    assert retrieval("a cat", texts=["a dog", "a cat", "a bus"])[0]["index"] == 1


def test_picture_as_query_over_texts(retrieval, vivid_fwd2bot, tiny_processor, pictures):
    texts = ["a dog", "a cat on a field", "three buses"]
    query = vivid_fwd2bot.embed(**tiny_processor.process_images(pictures(1)))
    expected = by_hand(query, vivid_fwd2bot.embed(**tiny_processor.process_texts(texts)))
    assert indices(retrieval(pictures(1)[0], texts=texts)) == [index for _, index in expected]


def test_summary_of_one_picture_as_query(retrieval, compress, pictures):
    summary = compress(pictures(5))
    assert retrieval(summary[2], images=pictures(5))[0]["index"] == 2
    assert [hits[0]["index"] for hits in retrieval(list(summary), summary=summary)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"one picture, got 5.*list\(summary\)"):
        retrieval(summary, images=pictures(5))


def test_queries_of_different_sorts_may_be_mixed(retrieval, compress, pictures):
    queries = [QUERY, pictures(5)[1], compress(pictures(5)[2]), {"text": "two cats"}]
    mixed = retrieval(queries, images=pictures(5), batch_size=4)
    alone = [retrieval(query, images=pictures(5)) for query in queries]
    assert [indices(hits) for hits in mixed] == [indices(hits) for hits in alone]


def test_batch_size_changes_no_result(retrieval, pictures):
    one = retrieval([QUERY, "two cats", "a bus"], images=pictures(5))
    retrieval.forget()
    three = retrieval([QUERY, "two cats", "a bus"], images=pictures(5), batch_size=3)
    assert [indices(hits) for hits in one] == [indices(hits) for hits in three]
    scores = [[hit["score"] for hits in rankings for hit in hits] for rankings in (one, three)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)


def test_candidates_may_be_a_data_set_or_an_iterator(retrieval, pictures, paths):
    data = datasets.Dataset.from_dict({"image": pictures(4), "text": ["a dog", "a cat", "a bus", "a bee"]})
    expected = retrieval(QUERY, images=pictures(4))
    for images in (data, data["image"], iter(paths[:4]), (path for path in paths[:4])):
        assert retrieval(QUERY, images=images) == expected
    assert retrieval(QUERY, texts=data) == retrieval(QUERY, texts=list(data["text"]))


def test_candidates_of_a_data_set_end_with_its_length(retrieval):
    class Endless(torch.utils.data.Dataset):
        """Raises no IndexError, as many that make their rows."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return f"text {index}"

    assert retrieval(QUERY, texts=Endless()) == retrieval(QUERY, texts=["text 0", "text 1", "text 2"])


def test_one_candidate_gives_its_score(retrieval, pictures):
    assert retrieval(QUERY, images=pictures(1)[0]) == retrieval(QUERY, images=pictures(1))
    assert retrieval(QUERY, texts="a cat") == retrieval(QUERY, texts=["a cat"])


def test_candidates_are_embedded_once(retrieval, vivid_fwd2bot, pictures, count_calls):
    calls = count_calls(vivid_fwd2bot, "_compress_pass")
    first = retrieval(QUERY, images=pictures(5), batch_size=5)
    pictures_and_text = len(calls)
    assert retrieval(QUERY, images=pictures(5)) == first  # other objects with the same pixels
    assert len(calls) == pictures_and_text + 1  # the text of the query alone


def test_only_new_candidates_are_embedded(retrieval, vivid_fwd2bot, pictures, count_calls):
    retrieval(QUERY, images=pictures(4))
    calls = count_calls(vivid_fwd2bot, "_compress_pass")
    hits = retrieval(QUERY, images=[*pictures(5)[::-1], pictures(1)[0]], top_k=None)
    assert len(calls) == 2  # the fifth picture, and the query
    retrieval.forget()
    assert indices(retrieval(QUERY, images=[*pictures(5)[::-1], pictures(1)[0]], top_k=None)) == indices(hits)


def test_changed_list_gives_no_stale_result(retrieval, pictures):
    images = pictures(3)
    assert retrieval(pictures(5)[4], images=images)[0]["score"] < 0.9999
    images[1] = pictures(5)[4]
    hits = retrieval(pictures(5)[4], images=images)
    assert hits[0] == {"score": pytest.approx(1, abs=TOLERANCE), "index": 1}


def test_picture_drawn_on_gives_no_stale_result(retrieval, pictures):
    images = pictures(3)
    retrieval(QUERY, images=images)
    changed = pictures(5)[4].resize(images[1].size)
    images[1].paste(changed)
    assert retrieval(changed, images=images)[0] == {"score": pytest.approx(1, abs=TOLERANCE), "index": 1}


def test_file_written_anew_gives_no_stale_result(retrieval, paths, pictures):
    retrieval(QUERY, images=paths)
    pictures(9)[8].save(paths[1])
    assert retrieval(pictures(9)[8], images=paths)[0] == {"score": pytest.approx(1, abs=TOLERANCE), "index": 1}


def test_changed_weights_give_no_stale_result(tiny_processor, pictures):
    model = tiny.tiny_fwd2bot()
    pipe = pipeline("fwd2bot-retrieval", model=model, processor=tiny_processor, device="cpu")
    before = pipe(QUERY, images=pictures(3))
    with torch.no_grad():
        model.summary_projector.weight.add_(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    after = pipe(QUERY, images=pictures(3))
    assert after != before
    pipe.forget()
    assert pipe(QUERY, images=pictures(3)) == after


def test_reading_of_candidates_has_a_progress_bar(retrieval, pictures, capsys):
    retrieval(QUERY, images=pictures(3), progress=True)
    written = capsys.readouterr().err
    assert "fwd2bot-retrieval reading images: 100%" in written and "3/3" in written
    retrieval(QUERY, images=pictures(3), progress=False)
    assert capsys.readouterr().err == ""


def test_another_length_is_another_embedding(retrieval, pictures):
    long = retrieval(QUERY, images=pictures(3))
    short = retrieval(QUERY, images=pictures(3), num_summary_tokens=1)
    assert [hit["score"] for hit in long] != [hit["score"] for hit in short]
    assert retrieval(QUERY, images=pictures(3)) == long


def test_summary_is_embedded_once_until_it_changes(retrieval, compress, vivid_fwd2bot, pictures, count_calls):
    summary = compress(pictures(5))
    calls = count_calls(vivid_fwd2bot, "embed")
    first = retrieval(QUERY, summary=summary)
    assert len(calls) == 2
    assert retrieval(QUERY, summary=summary) == first
    assert len(calls) == 3  # the query
    summary.tokens[0] = summary.tokens[4]
    scores = {hit["index"]: hit["score"] for hit in retrieval(QUERY, summary=summary)}
    assert scores[0] == pytest.approx(scores[4], abs=1e-6)  # CPUs differ in the order of their sums


def test_memory_keeps_the_latest_candidates(vivid_fwd2bot, tiny_processor, pictures, count_calls):
    pipe = pipeline("fwd2bot-retrieval", model=vivid_fwd2bot, processor=tiny_processor, device="cpu", memory_size=3)
    texts = ["one", "two", "three", "four", "five"]
    pipe(QUERY, texts=texts[:2])
    pipe(QUERY, texts=texts[2:4])
    calls = count_calls(vivid_fwd2bot, "embed")
    pipe(QUERY, texts=texts[1:2])
    assert len(calls) == 1  # "two" was still known
    pipe(QUERY, texts=texts[:1])
    assert len(calls) == 3  # "one" was not
    pipe(QUERY, texts=texts)
    calls.clear()
    pipe(QUERY, texts=texts)
    assert len(calls) == 1  # the latest set is kept, larger than the memory or not


@pytest.mark.parametrize("size", [-1, 1.5, True])
def test_bad_memory_size_is_refused(vivid_fwd2bot, tiny_processor, size):
    with pytest.raises(ValueError, match="memory_size"):
        pipeline("fwd2bot-retrieval", model=vivid_fwd2bot, processor=tiny_processor, device="cpu", memory_size=size)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True])
def test_bad_top_k_is_refused_before_any_compute(retrieval, vivid_fwd2bot, pictures, count_calls, top_k):
    calls = count_calls(vivid_fwd2bot, "_compress_pass")
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1"):
        retrieval(QUERY, images=pictures(3), top_k=top_k)
    assert not calls


@pytest.mark.parametrize(
    ("query", "candidates", "error", "message"),
    [
        (QUERY, {}, ValueError, "exactly one of images, summary and texts.*none"),
        (QUERY, {"images": ["a.png"], "texts": ["a"]}, ValueError, "got images and texts"),
        (QUERY, {"images": []}, ValueError, "No picture was given"),
        (QUERY, {"texts": []}, ValueError, "No text was given"),
        (QUERY, {"texts": iter(())}, ValueError, "No text was given"),
        (QUERY, {"texts": ["a", ""]}, ValueError, "Text 1: The text is empty"),
        (QUERY, {"texts": ["a", 5]}, TypeError, "Text 1: .*got int"),
        (QUERY, {"images": ["nowhere.png"]}, FileNotFoundError, "Picture 0: .*nowhere.png"),
        (QUERY, {"summary": "summaries.safetensors"}, TypeError, "got str.*load_file"),
        (QUERY, {"summary": torch.zeros(3, 2, 32, dtype=torch.int8)}, TypeError, "floating point.*got torch.int8"),
        (QUERY, {"summary": torch.zeros(2, 32)}, ValueError, r"\(N, k, d\).*got \(2, 32\)"),
        (QUERY, {"summary": torch.zeros(3, 2, 16)}, ValueError, "16 wide.*32 wide"),
        ([torch.zeros(1, 2, 32, dtype=torch.int8)], {"texts": ["a"]}, TypeError, "Query 0: .*got torch.int8"),
        (torch.zeros(1, 2, 16), {"texts": ["a"]}, ValueError, "16 wide.*32 wide"),
        ([], {"texts": ["a"]}, ValueError, "No query was given"),
        ("  ", {"texts": ["a"]}, ValueError, "text is empty"),
        (5, {"texts": ["a"]}, TypeError, "got int"),
        ([QUERY, 5], {"texts": ["a"]}, TypeError, "Query 1: A query must be"),
        (Path("nowhere.png"), {"texts": ["a"]}, FileNotFoundError, "nowhere.png"),
        ({"photo": "a.png"}, {"texts": ["a"]}, ValueError, "either 'text' or 'image'.*photo"),
        ("https://example.org/a.png", {"texts": ["a"]}, ValueError, "address of a picture.*{'image'"),
    ],
)
def test_bad_arguments_are_refused_before_any_compute(
    retrieval, vivid_fwd2bot, count_calls, query, candidates, error, message
):
    calls = count_calls(vivid_fwd2bot, "_compress_pass")
    with pytest.raises(error, match=message):
        retrieval(query, **candidates)
    assert not calls


def test_path_as_str_query_is_refused(retrieval, paths):
    with pytest.raises(ValueError, match="address of a picture"):
        retrieval(os.fspath(paths[0]), texts=["a"])
    retrieval({"text": os.fspath(paths[0])}, texts=["a"])


def test_truncated_candidate_is_named_by_its_place(retrieval, pictures, paths):
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"Picture 2: .*2\.png"):
        retrieval(QUERY, images=paths)


def test_summary_of_another_model_is_refused(retrieval, compress, pictures, monkeypatch):
    summary = compress(pictures(2))
    monkeypatch.setattr(retrieval.model.config, "fingerprint", "0123456789abcdef")
    summary.metadata["fingerprint"] = "fedcba9876543210"
    with pytest.raises(ValueError, match="another model"):
        retrieval(QUERY, summary=summary)
