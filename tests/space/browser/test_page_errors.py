"""The page in a real browser: what a visitor is told when something is wrong."""

import re

import pytest
from page_steps import ASKED, add, answers, ask, message, own_file, search, tab
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


@pytest.mark.parametrize(
    ("query", "words"), [("", "The query is empty. Write"), ("два снеговика", "simple English only")]
)
def test_bad_query_is_told_in_the_page(open_page, query, words):
    page = open_page()
    page.get_by_label("Find pictures that show").fill(query)
    page.click("#f2b-search")
    assert words in message(page, "search")


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
