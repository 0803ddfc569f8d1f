"""`fwd2bot search` and `fwd2bot ask`: what they find and answer, which model they take, what they show."""

import json
import resource
import shutil
import sys
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from command_runner import fails, run, run_json
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from fwd2bot.pipelines.embedded import gallery
from fwd2bot.pipelines.store import SummaryStore


def test_sentence_finds_its_picture_with_the_embedded_checkpoint(gallery_store):
    found = run_json("search", gallery_store, "I see two snowmen on a blue background", "--top-k", 2)
    assert [hit["source"] for hit in found["hits"]][0] == str(gallery()[47].path)
    assert len(found["hits"]) == 2


def test_picture_finds_itself(photo_store, photos, checkpoint):
    found = run_json("search", photo_store, "--image", photos / "3.png", "--model", checkpoint, "--rerank", "maxsim")
    assert found["hits"][0]["source"] == str(photos / "3.png")
    assert found["hits"][0]["score"] > 0.95


def test_search_prints_one_tab_separated_line_for_each_hit_when_piped(gallery_store):
    result = run("search", gallery_store, "a dog", "--top-k", 3)
    head, *lines = result.stdout.splitlines()
    assert head.split("\t") == ["score", "id", "source"]
    assert len(lines) == 3
    assert "\x1b" not in result.stdout


def test_where_chooses_among_the_rows(photo_store, checkpoint, ids):
    found = run_json("search", photo_store, "a dog", "--where", f"id = '{ids[2]}'", "--model", checkpoint)
    assert [hit["id"] for hit in found["hits"]] == [ids[2]]


def test_filter_that_does_not_parse_is_an_error(photo_store, checkpoint):
    assert "The filter 'id =' cannot be used" in fails(
        "search", photo_store, "a dog", "--where", "id =", "--model", checkpoint
    )


def test_model_of_the_store_is_found_by_name_in_this_folder(photo_store, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert len(run_json("search", photo_store, "a dog")["hits"]) == 5


def test_model_that_is_not_found_is_asked_for(photo_store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = fails("search", photo_store, "a dog")
    assert "'fwd2bot-test'" in message
    assert "--model" in message


@pytest.mark.parametrize("arguments", [[], ["a dog", "--image", "dog.jpg"]])
def test_neither_or_both_of_text_and_image_is_a_usage_error(photo_store, arguments):
    assert "one of the two" in fails("search", photo_store, *arguments, exit_code=2)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["search", " "], "TEXT"),
        (["ask", ""], "QUESTION"),
        (["ask", "What?", "--search", "\n"], "--search"),
    ],
)
def test_empty_text_is_a_usage_error(photo_store, command, named):
    name, *rest = command
    message = fails(name, photo_store, *rest, exit_code=2)
    assert "is empty. Give at least one word" in message and named in message


def test_missing_picture_is_an_error(photo_store):
    assert "'nowhere.jpg' does not exist" in fails("search", photo_store, "--image", "nowhere.jpg")


@pytest.mark.parametrize("command", [["search", "x"], ["ask", "x"], ["stats"], ["delete", "x"]])
def test_missing_store_is_an_error_that_says_how_to_make_one(command, tmp_path):
    name, *rest = command
    message = fails(name, tmp_path / "nowhere", *rest)
    assert "holds no store. Make one: fwd2bot index FOLDER --store" in message


def test_unknown_device_is_a_usage_error(gallery_store):
    assert "'abacus' cannot be used" in fails("search", gallery_store, "x", "--device", "abacus", exit_code=2)


def test_checkpoint_of_another_kind_is_refused(photo_store, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "no Fwd2Bot checkpoint but a model of the type 'bert'" in fails(
        "search", photo_store, "x", "--model", tmp_path
    )


def test_missing_lancedb_is_an_error_with_the_remedy(photo_store, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fwd2bot.pipelines.store")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert 'pip install "fwd2bot[store]"' in fails("stats", photo_store)


def test_debug_shows_the_traceback(tmp_path):
    result = run("stats", tmp_path / "nowhere", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


# ask


def test_answer_comes_from_the_picture_that_was_searched_for(gallery_store):
    found = run_json(
        "ask", gallery_store, "How many carrots are in the picture?", "--search", gallery()[43].captions[0]
    )
    [answer] = found["answers"]
    assert answer["answer"] == "3"
    assert [hit["source"] for hit in answer["pictures"]] == [str(gallery()[43].path)]


def test_each_of_several_pictures_has_its_own_answer(gallery_store):
    opened = SummaryStore.open(gallery_store)
    ids = {row["source"]: row["id"] for row in opened.get(list(opened))}
    pictures = [str(gallery()[number].path) for number in (43, 44, 47)]
    chosen = [argument for path in pictures for argument in ("--id", ids[path])]
    found = run_json("ask", gallery_store, "What colour is the background?", *chosen)
    assert [one["answer"] for one in found["answers"]] == ["white", "grey", "blue"]
    assert [one["pictures"][0]["source"] for one in found["answers"]] == pictures


def test_together_gives_one_answer_from_all_pictures(photo_store, checkpoint, ids):
    found = run_json(
        "ask", photo_store, "What?", "--together", "--top-k", 3, "--max-new-tokens", 4, "--model", checkpoint
    )
    [answer] = found["answers"]
    assert [picture["number"] for picture in answer["pictures"]] == [1, 2, 3]
    scores = [picture["score"] for picture in answer["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert set(answer["seconds"]) == {"retrieve", "read", "answer"} and min(answer["seconds"].values()) > 0


def test_answer_to_which_has_the_ids_that_it_names(gallery_store):
    found = run_json(
        "ask", gallery_store, "Which pictures show a snowman?", "--search", "two snowmen", "--top-k", 3, "--together"
    )
    [answer] = found["answers"]
    named = [picture["id"] for picture in answer["pictures"] if str(picture["number"]) in answer["answer"]]
    assert named and sorted(answer["used"]) == sorted(named)


def test_fallback_answers_from_the_originals(photo_store, photos, checkpoint, ids, tmp_path):
    asked = ["ask", photo_store, "What?", "--max-new-tokens", 4, "--model", checkpoint, "--fallback", "image"]
    [answer] = run_json(*asked, "--id", ids[1])["answers"]
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    pipe = pipeline(
        "fwd2bot-rag",
        model=model,
        processor=AutoProcessor.from_pretrained(checkpoint),
        store=str(photo_store),
        device="cpu",
    )
    wanted = pipe("What?", ids=[ids[1]], fallback="image", max_new_tokens=4, do_sample=False)
    assert (answer["answer"], answer["pictures"]) == (wanted["answer"], wanted["pictures"])
    copy = shutil.copytree(photo_store, tmp_path / "copy")
    opened = SummaryStore.open(copy)
    opened.add_summary(opened.summary(ids[0]), ids=["gone"], sources=["/nowhere/x.png"])
    asked[1] = copy
    assert "cannot be reached: 'gone' (/nowhere/x.png" in fails(*asked, "--id", "gone")


def test_ask_about_an_unknown_id_is_an_error(photo_store):
    assert "Not in the store" in fails("ask", photo_store, "What?", "--id", "nobody")


def test_id_beside_search_is_a_usage_error(photo_store):
    assert "leave out --search" in fails("ask", photo_store, "What?", "--id", "a", "--search", "b", exit_code=2)


# --show


def test_contact_sheet_shows_the_pictures_that_were_found(photo_store, photos, checkpoint, tmp_path):
    page = tmp_path / "hits.png"
    found = run_json("search", photo_store, "--image", photos / "3.png", "--model", checkpoint, "--show", page)
    assert found["shown"] == str(page)
    with Image.open(page) as sheet:
        assert sheet.size == (5 * 216 + 16, sheet.height)
        colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
        wanted = {colour for _, colour in tiny.pictures(5)[3].getcolors()}
    assert len(wanted & colours) >= len(wanted) / 2  # enlarged, its borders are blurred


def test_page_holds_the_pictures_and_escapes_everything(own_store, photos, checkpoint, tmp_path):
    evil = "<script>alert('x')</script>"
    opened = SummaryStore.open(own_store)
    [one] = [row for row in opened.get(list(opened)) if row["source"] == str(photos / "0.png")]
    opened.add_summary(
        opened.summary(one["id"]), ids=[evil], sources=["/nowhere/<b>.png"], metadata={"note": '"><img src=x>'}
    )
    page = tmp_path / "hits.html"
    assert run("ask", own_store, evil, "--model", checkpoint, "--top-k", 6, "--show", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 5
    assert text.count('class="missing"') == 1
    for raw in ("<script", "<b>", '"><img src=x>'):
        assert raw not in text


def test_rows_of_parquet_files_are_shown(photos, checkpoint, tmp_path):
    content = [path.read_bytes() for path in sorted(photos.iterdir())]
    text = "long " * 100
    pq.write_table(pa.table({"image": content, "ocr": [text] * 5}), tmp_path / "rows.parquet")
    store = tmp_path / "s"
    assert run("index", tmp_path / "rows.parquet", "--store", store, "--model", checkpoint).exit_code == 0
    result = run("search", store, "a dog", "--model", checkpoint, "--show", tmp_path / "hits.html")
    assert (tmp_path / "hits.html").read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 5
    assert all(line.endswith("…") and len(line) < 300 for line in result.stdout.splitlines()[1:])
    hits = run_json("search", store, "a dog", "--model", checkpoint)["hits"]
    assert {hit["metadata"]["ocr"] for hit in hits} == {text}


@contextmanager
def full_disk(size=1_000):
    """No file may grow beyond `size` bytes, in this process; for a block alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", [["search", "a dog"], ["ask", "What?", "--max-new-tokens", "2"]])
@pytest.mark.parametrize("ending", ["png", "html"])
def test_hits_are_printed_also_when_their_page_cannot_be_written(photo_store, checkpoint, tmp_path, command, ending):
    page = tmp_path / f"hits.{ending}"
    name, *rest = command
    arguments = (name, photo_store, *rest, "--model", checkpoint, "--top-k", 3, "--show", page)
    with full_disk():
        text, document = run(*arguments), run(*arguments, "--json")
    for result in (text, document):
        assert result.exit_code == 1
        assert f"error: {page} cannot be written: File too large." in result.stderr
    assert len(text.stdout.splitlines()) == 4
    found = json.loads(document.stdout)
    assert len(found["hits" if name == "search" else "answers"]) == 3 and found["shown"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hits.gif", "nowhere/hits.png"])
def test_place_that_cannot_be_shown_in_is_a_usage_error(photo_store, tmp_path, name):
    assert "--show" in fails("search", photo_store, "x", "--show", tmp_path / name, exit_code=2)
