"""`fwd2bot-rag`: what it finds, what the prompt holds, what it tells of itself, and the way back to the originals."""

import logging
import time
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import pipeline

from fwd2bot.pipelines.rag_context import named_pictures, numbered_prompt, read_originals
from fwd2bot.pipelines.store import SummaryStore

QUESTION = "Where?"
SHORT = {"max_new_tokens": 6, "do_sample": False}


def ids_of(result):
    return [picture["id"] for picture in result["pictures"]]


def text(output):
    [answer] = output
    return answer["generated_text"]


@pytest.fixture
def own_store(vivid_fwd2bot, tiny_processor, tmp_path):
    """Three picture files and a store of them, which a test may destroy."""
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, picture in zip(paths, tiny.pictures(3), strict=True):
        picture.save(path)
    store = SummaryStore.create(tmp_path / "store", vivid_fwd2bot, tiny_processor)
    store.add(paths, ids=["a", "b", "c"])
    return store, paths


def numbered(question, count):
    """The question as a chat in which each of several pictures has its number in front."""
    content = []
    for number in range(1, count + 1):
        content += [{"type": "text", "text": f"picture {number}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def test_answer_is_that_from_the_summaries_found(rag, answer, picture_store):
    result = rag(QUESTION, **SHORT)
    hits = picture_store.search(QUESTION, top_k=3)
    assert result["pictures"] == [{"number": number, **hit} for number, hit in enumerate(hits, 1)]
    summary = picture_store.summary(ids_of(result))
    assert result["answer"] == text(answer(numbered(QUESTION, 3), summary=summary, **SHORT))


@pytest.mark.parametrize("question", ["Which?", [{"role": "user", "content": "Which?"}]])
def test_several_pictures_are_numbered_in_the_prompt(tiny_processor, question):
    prompt = numbered_prompt(question, 2, tiny_processor)
    assert prompt.split("USER: ")[1] == "picture 1: <image>\n\npicture 2: <image>\n\nWhich? ASSISTANT:"
    alone = numbered_prompt(question, 1, tiny_processor)
    assert alone.split("USER: ")[1] == "<image>\nWhich? ASSISTANT:"


@pytest.mark.parametrize(
    "image, expected",
    [
        ("Picture {{ loop.index }}: <image>", "Picture 1: <image>Picture 2: <image>Which?"),
        ("No. {{ loop.index }}: <b>[A]<image>[B]", "No. 1: <b>[A]<image>[B]No. 2: <b>[A]<image>[B]Which?"),
        ("<image>", "<image><image>Which?"),  # a number would not be beside its picture
    ],
)
def test_pictures_are_numbered_once_and_where_they_are(image, expected):
    processor = tiny.tiny_processor()
    parts = "{%% for part in messages[0]['content'] if part['type'] == '%s' %%}%s{%% endfor %%}"
    processor.chat_template = parts % ("image", image) + parts % ("text", "{{ part['text'] }}")
    assert numbered_prompt("Which?", 2, processor) == expected


def test_pictures_whose_places_are_marked_are_not_numbered(tiny_processor):
    marked = tiny.conversation("Which?", 2)
    assert numbered_prompt(marked, 2, tiny_processor) == tiny.prompts(tiny_processor, ["Which?"], 2)[0]


def test_answer_depends_on_the_pictures(rag):
    assert rag(QUESTION, ids=["p0", "p1"], **SHORT)["answer"] != rag(QUESTION, ids=["p3", "p4"], **SHORT)["answer"]


def test_text_stage_answers_from_the_store_alone(checkpoint, tmp_path):
    load = {"model": str(checkpoint), "device": "cpu"}
    whole = pipeline("fwd2bot-compress", **load)
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, picture in zip(paths, tiny.pictures(4), strict=True):
        picture.save(path)
    store = SummaryStore.create(tmp_path / "store", whole.model, whole.processor)
    store.add(paths)
    expected = pipeline("fwd2bot-rag", store=store, **load)(QUESTION, **SHORT)
    for path in paths:
        path.unlink()
    pipe = pipeline("fwd2bot-rag", store=str(tmp_path / "store"), model_kwargs={"stage": "text"}, **load)
    assert not any("vision" in name for name, _ in pipe.model.named_parameters())
    result = pipe(QUESTION, **SHORT)
    assert (result["answer"], result["pictures"]) == (expected["answer"], expected["pictures"])
    assert [picture["source"] for picture in result["pictures"]] != [None] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_question_has_its_own_pictures_whatever_the_batch(rag, batch_size):
    rows = [
        {"question": QUESTION, "ids": ["p4"]},
        {"question": "What?", "query": "a much longer sentence to search for"},
        {"question": "Who is the one that nobody else knows?", "ids": ["p2", "p0"]},
    ]
    expected = [rag(row, **SHORT) for row in rows]
    results = rag(rows, batch_size=batch_size, **SHORT)
    for result, one in zip(results, expected, strict=True):
        assert (result["answer"], ids_of(result)) == (one["answer"], ids_of(one))


def test_data_set_gives_an_iterator(rag):
    questions = [QUESTION, "What?"]
    results = rag(datasets.Dataset.from_dict({"question": questions, "other": [1, 2]}), **SHORT)
    assert not isinstance(results, list)
    assert [result["answer"] for result in results] == [rag(question, **SHORT)["answer"] for question in questions]


def test_given_ids_stay_in_their_order_and_nothing_is_searched(rag, count_calls):
    searches = count_calls(rag.store, "search")
    result = rag([QUESTION], ids=["p3", "p1"], **SHORT)[0]
    assert [(one["number"], one["id"], one["score"]) for one in result["pictures"]] == [
        (1, "p3", None),
        (2, "p1", None),
    ]
    assert result["pictures"][0]["metadata"] == {"year": 2003}
    assert not searches


def test_query_searches_in_place_of_the_question(rag, picture_store, pictures):
    result = rag(QUESTION, query=pictures(5)[4], top_k=1, **SHORT)
    assert ids_of(result) == ["p4"]


def test_filter_restricts_the_pictures(rag):
    assert set(ids_of(rag(QUESTION, where="year >= 2004", **SHORT))) == {"p4", "p5"}


def test_filter_that_nothing_fits_is_an_error(rag):
    with pytest.raises(ValueError, match="no picture that fits the filter 'year > 3000'"):
        rag(QUESTION, where="year > 3000", **SHORT)


def test_shorter_summaries_are_their_first_tokens(rag, answer, picture_store):
    result = rag(QUESTION, num_summary_tokens=2, **SHORT)
    summary = picture_store.summary(ids_of(result)).truncate(2)
    assert result["answer"] == text(answer(numbered(QUESTION, 3), summary=summary, **SHORT))


def test_top_k_is_the_number_of_pictures_here_or_at_the_making(vivid_fwd2bot, tiny_processor, picture_store):
    pipe = pipeline(
        "fwd2bot-rag", model=vivid_fwd2bot, processor=tiny_processor, store=picture_store, top_k=2, device="cpu"
    )
    assert len(pipe(QUESTION, **SHORT)["pictures"]) == 2
    assert len(pipe(QUESTION, top_k=4, **SHORT)["pictures"]) == 4


def test_generate_gets_its_arguments(rag, answer, picture_store):
    ids = ["p0", "p1"]
    options = {"do_sample": True, "max_new_tokens": 8, "generate_kwargs": {"top_k": 1}}  # the most likely token
    expected = answer(numbered(QUESTION, 2), summary=picture_store.summary(ids), max_new_tokens=8, do_sample=False)
    assert rag(QUESTION, ids=ids, **options)["answer"] == text(expected)
    with pytest.raises(TypeError, match="RagPipeline has no argument 'max_new_token'. Did you mean 'max_new_tokens'"):
        rag(QUESTION, max_new_token=8)


def test_chat_is_searched_for_by_its_last_message(rag, answer, picture_store):
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "And a dog?"},
    ]
    marked = [*numbered(QUESTION, 2), *chat[1:]]
    result = rag(chat, top_k=2, **SHORT)
    assert ids_of(result) == [hit["id"] for hit in picture_store.search("And a dog?", top_k=2)]
    assert result["answer"] == text(answer(marked, summary=picture_store.summary(ids_of(result)), **SHORT))


def test_seconds_are_those_of_the_steps(rag):
    begin = time.perf_counter()
    results = rag([QUESTION, "What?", "Who?"], batch_size=3, **SHORT)
    took = time.perf_counter() - begin
    assert all(set(result["seconds"]) == {"retrieve", "read", "answer"} for result in results)
    assert all(second > 0 for result in results for second in result["seconds"].values())
    assert sum(sum(result["seconds"].values()) for result in results) < took


@pytest.mark.parametrize(
    "question, answer, expected",
    [
        ("Which of these pictures show a dog?", "1 and 3", [1, 3]),
        ("Which pictures have a cat?", "3, 1 and 2.", [3, 1, 2]),
        ("Which picture has most things?", "2", [2]),
        ("Which pictures show a dog?", "none", []),
        ("Which pictures show a dog?", "7", []),
        ("How many pictures show a dog?", "2", []),
        ("What is red?", "the car in picture 2, and those in images 1 and 3", [2, 1, 3]),
        ("Which thing is at the top?", "3 cars", []),
    ],
)
def test_named_pictures_are_read_from_the_words(question, answer, expected):
    assert named_pictures(question, answer, 3) == expected


@pytest.mark.parametrize("words, used", [(" 1 and 3", ["x", "z"]), (" none", None)])
def test_used_are_the_ids_of_the_named_pictures(rag, words, used):
    ids = torch.tensor(rag.tokenizer(words, add_special_tokens=False)["input_ids"])
    pictures = [{"number": number, "id": one} for number, one in enumerate("xyz", 1)]
    output = {"question": "Which?", "text": "Which?", "ids": [ids], "pictures": pictures, "seconds": {}}
    assert rag.postprocess(output) == {"answer": words.strip(), "pictures": pictures, "used": used, "seconds": {}}


def test_fallback_answers_as_the_bare_backbone(rag, tiny_processor, pictures):
    prompt = tiny_processor.apply_chat_template(numbered(QUESTION, 2), add_generation_prompt=True)
    inputs = tiny_processor.backbone_processor(
        images=[pictures(6)[4], pictures(6)[1]], text=prompt, return_tensors="pt", add_special_tokens=False
    )
    ids = tiny.tiny_backbone().generate(**inputs, **SHORT)[0, inputs["input_ids"].shape[1] :]
    expected = tiny_processor.decode(ids, skip_special_tokens=True).strip()
    result = rag([QUESTION], ids=["p4", "p1"], fallback="image", **SHORT)[0]
    assert (result["answer"], ids_of(result)) == (expected, ["p4", "p1"])
    assert expected != rag(QUESTION, ids=["p4", "p1"], **SHORT)["answer"]


def test_fallback_names_the_originals_that_cannot_be_reached(vivid_fwd2bot, tiny_processor, own_store):
    store, (_, gone, changed) = own_store
    gone.unlink()
    tiny.pictures(1, seed=9)[0].save(changed)
    store.add_summary(store.summary("a"), ids=["d"])
    pipe = pipeline("fwd2bot-rag", model=vivid_fwd2bot, processor=tiny_processor, store=store, device="cpu")
    assert pipe(QUESTION, ids=["a"], fallback="image", **SHORT)["answer"]
    with pytest.raises(FileNotFoundError, match="3 of 4.*'b'.*1.png: it does not exist.*'c'.*changed.*'d'.*no source"):
        pipe(QUESTION, ids=["a", "b", "c", "d"], fallback="image", **SHORT)
    assert ids_of(pipe(QUESTION, ids=["b", "d"], **SHORT)) == ["b", "d"]


def test_fallback_reads_rows_of_parquet_files(vivid_fwd2bot, tiny_processor, pictures, tmp_path):
    content = []
    for picture in pictures(5):
        content.append(BytesIO())
        picture.save(content[-1], "PNG")
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [one.getvalue() for one in content]}), file, row_group_size=2)
    store = SummaryStore.create(tmp_path / "store", vivid_fwd2bot, tiny_processor)
    store.add(file)
    ids = {row["source"]: row["id"] for row in store.get(list(store))}
    chosen = [ids[f"{file}#{row}"] for row in (3, 0)]
    found = read_originals(store, chosen, tiny_processor.load_image)
    for one, row in zip(found, (3, 0), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(pictures(5)[row]))
    pq.write_table(pa.table({"image": [content[0].getvalue(), content[1].getvalue()]}), file)
    with pytest.raises(FileNotFoundError, match="1 of 2 cannot be reached: .*rows.parquet#3: .*has no row 3"):
        read_originals(store, chosen, tiny_processor.load_image)


def test_fallback_needs_the_vision_tower(checkpoint, tmp_path):
    load = {"model": str(checkpoint), "device": "cpu"}
    whole = pipeline("fwd2bot-compress", **load)
    SummaryStore.create(tmp_path / "store", whole.model, whole.processor)
    pipe = pipeline("fwd2bot-rag", store=tmp_path / "store", model_kwargs={"stage": "text"}, **load)
    with pytest.raises(ValueError, match="fallback='image'.*stage='text'.*Load it without"):
        pipe(QUESTION, fallback="image")
    with pytest.raises(ValueError, match="store.* is empty"):
        pipe(QUESTION)


@pytest.mark.parametrize("fallback", [None, "image"])
def test_more_than_the_model_reads_is_an_error(rag, fallback):
    with pytest.raises(ValueError, match="answer may have 500; together the model reads at most 512.*fewer pictures"):
        rag(QUESTION, max_new_tokens=500, fallback=fallback)


@pytest.mark.parametrize("fallback", [None, "image"])
def test_long_question_is_an_error_without_a_warning_of_the_tokenizer(rag, fallback, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(rag.processor.tokenizer, "deprecation_warnings", {})  # it warns once in its life
    with pytest.raises(ValueError, match="together the model reads at most 512"):
        rag("Where? " * 100, ids=["p0"], fallback=fallback)
    with pytest.raises(ValueError, match="together the model reads at most 512"):
        rag.chat(ids=["p0"]).ask("Where? " * 100)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"questions": " "}, ValueError, "question is empty"),
        ({"questions": []}, ValueError, "No question"),
        ({"questions": 3}, TypeError, "Expected a question"),
        ({"questions": [{"query": "a dog"}]}, ValueError, "Question 0: A row must have a 'question'"),
        ({"questions": {"question": "What?", "images": ["a.png"]}}, ValueError, "brings images .*fwd2bot-answer"),
        ({"query": "a dog", "ids": ["p1"]}, ValueError, "query or ids, got both"),
        ({"ids": []}, ValueError, "No id was given"),
        ({"ids": ["p1", "q"]}, ValueError, "Not in the store.*'q'"),
        ({"top_k": 0}, ValueError, "top_k, the number of pictures.*got 0"),
        ({"where": "what is this"}, ValueError, "filter 'what is this'"),
        ({"fallback": "images"}, ValueError, "fallback='images' is unknown"),
        ({"num_summary_tokens": 9}, ValueError, "Cannot truncate to 9"),
        ({"num_return_sequences": 2, "num_beams": 2}, ValueError, "one answer"),
        ({"return_full_text": True}, TypeError, "no argument 'return_full_text'"),
    ],
)
def test_wrong_input_is_refused(rag, options, error, message):
    with pytest.raises(error, match=message):
        rag(**{"questions": QUESTION, **options})


def test_pipeline_without_a_store_is_refused(vivid_fwd2bot, tiny_processor):
    with pytest.raises(ValueError, match="answers from a store"):
        pipeline("fwd2bot-rag", model=vivid_fwd2bot, processor=tiny_processor, device="cpu")


def test_store_of_another_model_is_refused(tiny_processor, picture_store):
    with pytest.raises(ValueError, match="was made by another model"):
        pipeline(
            "fwd2bot-rag", model=tiny.tiny_fwd2bot(5), processor=tiny_processor, store=picture_store, device="cpu"
        )
