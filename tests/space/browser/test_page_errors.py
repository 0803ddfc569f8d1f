"""The page in a real browser: what a visitor is told when something is wrong."""

import re

import pytest
from page_steps import (
    ASKED,
    QUERY_FILE,
    add,
    answers,
    ask,
    hits,
    large_file,
    message,
    own_file,
    search,
    settle,
    tab,
    toasts,
    type_number,
)
from space_files import wide_png


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.jpg", b"only words", "“notes.jpg” is no picture"),
        ("bomb.png", "bomb", "“bomb.png” .*[Rr]esize it first"),
        ("empty.png", b"", "“empty.png” is empty"),
    ],
)
def test_bad_file_is_told_in_the_page(open_page, name, content, words):
    page = open_page()
    content = wide_png() if content == "bomb" else content
    told = add(page, {"name": name, "mimeType": "image/png", "buffer": content})
    assert re.search(words, told), told


def test_five_hundred_files_at_once_are_refused_and_the_page_goes_on(open_page, space):
    page = open_page()
    assert "500 files came at once; at most 24" in add(page, *[own_file(i % 60, f"{i}.png") for i in range(500)])
    assert not [path for path in space.uploads.rglob("*") if path.is_file() and path.stat().st_size]
    assert search(page, "two snowmen on a blue field")[0] == "1. Picture 47"


# Files that are too large


LARGE = "“large.png” has 11.0 MB; at most 10 MB are taken. Make it smaller first"


def test_large_file_is_told_by_name_and_the_good_ones_of_its_batch_are_taken(open_page):
    page = open_page()
    page.get_by_label("Find pictures that show").fill("")
    page.click("#f2b-search")
    assert "The query is empty" in message(page, "search")
    files = [own_file(43, "one.png"), large_file("large.png"), own_file(47, "two.png")]
    page.set_input_files("#f2b-upload input[type=file]", files)
    page.wait_for_selector("#f2b-own img")
    told = message(page, "search")
    assert told.startswith(f"2 of your pictures added and compressed. {LARGE}")
    assert toasts(page) == []
    assert page.locator("#f2b-own li").all_inner_texts() == ["one.png", "two.png"]


def test_large_files_alone_are_told_without_being_sent(open_page):
    page = open_page()
    assert LARGE in add(page, large_file("large.png"))
    page.set_input_files(QUERY_FILE, large_file("query.png", 12))
    page.get_by_text("“query.png” has 12.0 MB").first.wait_for()
    assert toasts(page) == []
    assert not [url for url in page.asked if "/upload" in url]


def test_search_with_a_large_picture_fails_like_any_other_and_leaves_no_hits(open_page, space):
    page = open_page()
    search(page, "two snowmen on a blue field")
    page.set_input_files(QUERY_FILE, large_file("query.png", 12))
    page.get_by_text("“query.png” has 12.0 MB").first.wait_for()
    page.wait_for_selector("#f2b-found li", state="detached")
    type_number(page, "k, summary tokens of each picture", "2")
    page.keyboard.press("Tab")
    settle(page, space)
    assert page.locator("#f2b-found li").count() == 0 and "12.0 MB" in message(page, "search")


def test_large_picture_that_was_to_be_added_leaves_the_hits(open_page):
    page = open_page()
    search(page, "two snowmen on a blue field")
    assert LARGE in add(page, large_file("large.png"))
    assert len(hits(page)) == 6


def test_large_files_that_are_dropped_or_pasted_are_told(open_page):
    page = open_page()
    bring = """([kind, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(11 * 2 ** 20)], 'large.png', { type: 'image/png' }));
      transfer.items.add(new File([new Uint8Array(bytes)], 'good.png', { type: 'image/png' }));
      const event = kind == 'drop'
        ? new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true })
        : new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true });
      document.querySelector('#f2b-upload button').dispatchEvent(event);
    }"""
    for number, kind in enumerate(["drop", "paste"], 1):
        page.evaluate(bring, [kind, list(own_file(number, "")["buffer"])])
        page.wait_for_function(f"document.querySelectorAll('#f2b-own img').length == {number}")
        assert f"1 of your pictures added and compressed. {LARGE}" in message(page, "search")


# Numbers out of range


@pytest.mark.parametrize(("typed", "meant"), [("99", "16"), ("0", "1"), ("-3", "1"), ("2.5", "2")])
def test_k_out_of_range_is_taken_for_the_nearest_and_page_and_results_agree(open_page, space, caplog, typed, meant):
    page = open_page()
    search(page, "two snowmen on a blue field")
    type_number(page, "k, summary tokens of each picture", typed)
    page.wait_for_selector(f"#f2b-found h3:has-text('k = {meant}')")
    page.keyboard.press("Tab")
    settle(page, space)
    field = page.get_by_label("number input for k, summary tokens of each picture").first
    assert (field.input_value(), page.inner_text("#f2b-hits")) == (meant, f"The best 6 at k = {meant}")
    assert toasts(page) == [] and "Traceback" not in caplog.text and len(hits(page)) == 6


def test_empty_number_field_keeps_the_results(open_page, space, caplog):
    page = open_page()
    search(page, "two snowmen on a blue field")
    type_number(page, "k, summary tokens of each picture", "")
    page.keyboard.press("Tab")
    settle(page, space)
    field = page.get_by_label("number input for k, summary tokens of each picture").first
    assert page.inner_text("#f2b-hits") == f"The best 6 at k = {field.input_value()}"
    assert toasts(page) == [] and "Traceback" not in caplog.text


def test_number_of_pictures_to_find_out_of_range_is_taken_for_the_nearest(open_page):
    page = open_page()
    tab(page, "Ask")
    type_number(page, "Pictures for the question to find", "77")
    ask(page, ASKED)
    answers(page)
    assert page.locator("#f2b-talk .f2b-small li").count() == 5
    assert toasts(page) == []


# Queries and questions


@pytest.mark.parametrize(
    ("query", "words"), [("", "The query is empty. Write"), ("два снеговика", "simple English only")]
)
def test_bad_query_is_told_in_the_page(open_page, query, words):
    page = open_page()
    page.get_by_label("Find pictures that show").fill(query)
    page.click("#f2b-search")
    assert words in message(page, "search")


def test_question_in_another_script_is_told_what_to_write(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, "это что?", "gallery-43")
    told = message(page, "ask")
    assert "Write it in English, such as “How many carrots are in the picture?”" in told


def test_question_without_a_picture_is_told_in_the_page(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, ASKED)
    assert "No picture is chosen. Tick one below" in message(page, "ask")


def test_fault_of_the_server_is_told_without_a_traceback(open_page, service, monkeypatch, caplog):
    page = open_page()

    def fails(*arguments, **options):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service, "search", fails)
    page.get_by_label("Find pictures that show").fill("a dog")
    page.click("#f2b-search")
    assert "Something went wrong on the server" in message(page, "search")
    assert "secret detail" not in page.content() and "Traceback" not in page.content()
    assert "secret detail" in caplog.text


def test_text_of_visitors_is_shown_as_text(open_page):
    page = open_page()
    name = "<img src=x onerror=alert(1)>${alert(2)}{{value}}.png"
    page.on("dialog", lambda dialog: pytest.fail("it ran"))
    add(page, own_file(3, name))
    tab(page, "Ask")
    ask(page, "<b>${1+1}</b> {{value}} what is it?", "own-1")
    answers(page)
    assert page.inner_text("#f2b-talk .f2b-question") == "<b>${1+1}</b> {{value}} what is it?"
    assert page.locator("#f2b-talk b, #f2b-own img[src=x]").count() == 0


def test_missing_model_is_told_in_the_page(browser, tmp_path):
    from fwd2bot.space_app.options import SpaceOptions, load_service
    from fwd2bot.space_app.serving import RunningSpace

    with pytest.raises(OSError) as error:
        load_service(SpaceOptions(model=str(tmp_path / "nowhere")))
    with RunningSpace(None, str(error.value)) as space:
        page = browser.new_page()
        page.goto(space.url)
        words = page.wait_for_selector(".f2b-message").inner_text()
        assert "cannot start. There is no folder" in words and "Give the folder of a checkpoint" in words
        page.close()
