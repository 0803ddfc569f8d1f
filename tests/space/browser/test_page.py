"""The page in a real browser: what a visitor does in each tab, and what they see when something is wrong."""

import os
import re
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from space_files import wide_png

from fwd2bot.pipelines.embedded import gallery

ASKED = "How many carrots are in the picture?"


def add(page, *files):
    page.set_input_files("#f2b-upload input[type=file]", list(files))
    return message(page, "search")


def message(page, tab):
    shown = page.wait_for_selector(f"#f2b-{tab}-status .f2b-message")
    return shown.inner_text()


def search(page, text):
    page.get_by_label("Find pictures that show").fill(text)
    page.click("#f2b-search")
    page.wait_for_selector("#f2b-found li")
    return hits(page)


def hits(page):
    return [line for line in page.inner_text("#f2b-found ol").splitlines() if ". " in line]


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def ask(page, text, *ids):
    for one in ids:
        page.check(f"#f2b-ask-pick input[value={one}]")
    page.get_by_label("Question about the pictures").fill(text)
    page.click("#f2b-ask")


def answers(page):
    page.wait_for_function("document.querySelectorAll('#f2b-costs tbody td').length == 8")
    page.wait_for_function("![...document.querySelectorAll('#f2b-costs td')].some((one) => one.innerText == '–')")
    return [one.inner_text() for one in page.query_selector_all("#f2b-talk .f2b-answer")]


def own_file(number, name):
    return {"name": name, "mimeType": "image/png", "buffer": gallery()[number].path.read_bytes()}


def is_wider_than_the_window(page):
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def take(page, folder, name, height):
    """A picture of the page for the documentation, in few enough bytes."""
    page.mouse.move(0, 0)
    content = page.screenshot(clip={"x": 100, "y": 0, "width": 800, "height": height}, full_page=True)
    path = folder / f"space-{name}.png"
    with Image.open(BytesIO(content)) as picture:
        picture.convert("RGB").quantize(255).save(path, optimize=True)
    assert path.stat().st_size < 200_000


# Search


def test_sentence_finds_and_slider_ranks_anew(open_page, service, monkeypatch):
    page = open_page()
    assert search(page, "two snowmen on a blue field")[0] == "1. Picture 47"
    monkeypatch.setattr(service.model, "compress", None)  # the slider needs no model
    page.get_by_label("number input for k, summary tokens of each picture").first.fill("2")
    page.keyboard.press("Tab")
    page.wait_for_selector("#f2b-found h3:has-text('k = 2')")
    assert len(hits(page)) == 6


def test_slider_after_a_search_that_failed_does_not_bring_the_one_before(open_page):
    page = open_page()
    search(page, "two snowmen on a blue field")
    page.get_by_label("Find pictures that show").fill("")
    page.click("#f2b-search")
    assert "The query is empty" in message(page, "search")
    with page.expect_response(lambda answer: "/queue/join" in answer.url):
        page.get_by_label("number input for k, summary tokens of each picture").first.fill("2")
        page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    assert "The query is empty" in message(page, "search")
    assert page.locator("#f2b-found li").count() == 0


def test_picture_finds_its_like(open_page):
    page = open_page()
    page.set_input_files("#f2b-like input[type=file], input[type=file] >> nth=1", own_file(29, "query.png"))
    page.wait_for_selector("#f2b-found li")
    assert hits(page)[0] == "1. Picture 29"


def test_uploads_are_added_shown_found_and_removed(open_page):
    page = open_page()
    words = add(page, own_file(43, "one.png"), own_file(47, "two.png"))
    assert words == "2 of your pictures added and compressed."
    page.wait_for_selector("#f2b-own img")
    assert search(page, "two snowmen on a blue field")[:2] in (
        ["1. two.png", "2. Picture 47"],
        ["1. Picture 47", "2. two.png"],
    )
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-own img", state="detached")
    page.wait_for_selector("#f2b-found li", state="detached")
    assert "forgotten" in message(page, "search")


def test_progress_is_seen_while_pictures_are_compressed(open_page, service, monkeypatch):
    page = open_page()
    compress, seen, batches = service.compress, threading.Event(), []

    def second_batch_waits(images):
        if batches:
            seen.wait(20)
        batches.append(len(images))
        return compress(images)

    monkeypatch.setattr(service, "compress", second_batch_waits)
    page.set_input_files("#f2b-upload input[type=file]", [own_file(index, f"{index}.png") for index in range(9)])
    page.get_by_text("8/9").first.wait_for()
    seen.set()
    assert message(page, "search") == "9 of your pictures added and compressed."
    assert batches == [8, 1]


def test_pasted_picture_is_added(open_page):
    page = open_page()
    page.evaluate(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], 'pasted.png', { type: 'image/png' }));
          document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }));
        }""",
        list(gallery()[3].path.read_bytes()),
    )
    assert "1 of your pictures added" in message(page, "search")
    assert "pasted.png" in page.inner_text("#f2b-own")


# Ask


def test_answer_is_streamed_beside_the_uncompressed_one_with_its_costs(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    assert answers(page) == ["3", "3"]
    rows = [row.inner_text().split() for row in page.query_selector_all("#f2b-costs tbody tr")]
    assert [row[-2:] for row in rows if row[0] == "tokens"] == [["8", "64"]]
    assert [row[0] for row in rows] == ["tokens", "bytes", "time", "cache"]


def test_answer_is_seen_while_it_is_made(open_page, space):
    """A description of many words: its beginning is in the page before its end."""
    page = open_page()
    tab(page, "Ask")
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
          const one = document.querySelector('#f2b-talk .f2b-answer');
          if (one) window.seen.push(one.innerText);
        }).observe(document.querySelector('#f2b-talk'), { childList: true, subtree: true, characterData: true }); }"""
    )
    ask(page, "Describe the picture.", "gallery-43")
    final = answers(page)[0]
    seen = list(dict.fromkeys(page.evaluate("window.seen")))
    assert len(final.split()) > 5
    assert len([one for one in seen if one != final and final.startswith(one)]) >= 2, seen


def test_follow_up_keeps_the_conversation_and_new_begins_another(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    answers(page)
    ask(page, "What colour is the background?")
    page.wait_for_function("document.querySelectorAll('#f2b-talk .f2b-turn').length == 2")
    assert len(answers(page)) == 4
    page.click("#f2b-fresh")
    page.wait_for_selector("#f2b-talk .f2b-turn", state="detached")


def test_question_finds_its_picture(open_page):
    page = open_page()
    tab(page, "Ask")
    page.get_by_label("number input for Pictures for the question to find").fill("1")
    page.keyboard.press("Tab")
    ask(page, "How many snowmen are on the blue field?")
    answers(page)
    assert "Picture 47" in page.inner_text("#f2b-talk")


# Look inside


def test_look_inside_shows_a_map_for_each_token_and_the_sizes(open_page):
    page = open_page()
    tab(page, "Look inside")
    page.check("#f2b-look-pick input[value=gallery-43]")
    page.click("#f2b-look")
    page.wait_for_selector("#f2b-inside ol img")
    assert page.locator("#f2b-inside ol img").count() == 8
    assert "summary token 1 looked most at row" in page.locator("#f2b-inside ol img").first.get_attribute("alt")
    assert "JPEG, quality 75" in page.inner_text("#f2b-inside")
    assert "two snowmen" in page.inner_text("#f2b-inside")


# What goes wrong


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
        assert "cannot start. There is no folder" in words and "Give --model" in words
        page.close()


# Everybody, everywhere


def test_two_visitors_at_once_do_not_see_each_other(open_page):
    one, other = open_page(), open_page()
    add(one, own_file(43, "mine.png"))
    add(other, own_file(47, "theirs.png"))
    for page in (one, other):
        tab(page, "Ask")
        ask(page, "What colour is the background?", "own-1")
    assert (answers(one)[0], answers(other)[0]) == ("white", "blue")
    assert "mine.png" not in other.content() and "theirs.png" not in one.content()


def test_visitor_who_closes_the_page_frees_what_they_held(open_page, space, service):
    page = open_page()
    add(page, own_file(43, "mine.png"))
    assert any("mine.png" in [one.title for one in held.pictures.values()] for held in _held(service))
    page.close()
    end = time.monotonic() + 20
    while any(held.pictures for held in _held(service)) and time.monotonic() < end:
        threading.Event().wait(0.1)
    space.sweep()
    assert not any(held.pictures for held in _held(service))
    kept = [state.config_values for state in space.page.state_holder.session_data.values()]
    assert "mine.png" not in str(kept)
    assert not [path for path in space.uploads.rglob("*") if path.is_file() and path.stat().st_size]


def _held(service):
    return list(service.visitors._visitors.values())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_tab_fits_into_400_pixels(open_page, tmp_path, dark):
    page = open_page(width=400, height=800, dark=dark)
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    search(page, "two snowmen on a blue field")
    assert not is_wider_than_the_window(page)
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    answers(page)
    assert not is_wider_than_the_window(page)
    tab(page, "Look inside")
    page.check("#f2b-look-pick input[value=gallery-43]")
    page.click("#f2b-look")
    page.wait_for_selector("#f2b-inside ol img")
    assert not is_wider_than_the_window(page)


def tab_to(page, target):
    """Press Tab until an element has the focus."""
    for _ in range(120):
        if target.evaluate("(one) => one === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"no Tab leads to {target}")


def test_keyboard_alone_searches_and_asks(open_page):
    page = open_page()
    tab_to(page, page.get_by_label("Find pictures that show"))
    page.keyboard.type("two snowmen on a blue field")
    page.keyboard.press("Enter")
    page.wait_for_selector("#f2b-found li")
    tab_to(page, page.get_by_role("tab", name="Ask"))
    page.keyboard.press("Enter")
    tab_to(page, page.locator("#f2b-ask-pick input[value=gallery-43]"))
    page.keyboard.press("Space")
    tab_to(page, page.get_by_label("Question about the pictures"))
    page.keyboard.type(ASKED)
    page.keyboard.press("Enter")
    assert answers(page) == ["3", "3"]


def test_screen_reader_is_told_when_something_is_done(open_page):
    page = open_page()
    search(page, "two snowmen on a blue field")
    region = page.locator("#f2b-search-status [role=status][aria-live=polite]")
    region.get_by_text("6 pictures found").wait_for(state="attached")
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    region = page.locator("#f2b-ask-status [role=status][aria-live=polite]")
    region.get_by_text("Answer complete. From the summaries: 3. Uncompressed: 3.").wait_for(state="attached")


CONTRAST = """(one) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  let behind = one;
  const fill = () => numbers(getComputedStyle(behind).backgroundColor);
  while (fill().length > 3 && fill()[3] === 0) behind = behind.parentElement;
  const both = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor].map(light);
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""  # as WCAG 2 defines it


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(open_page, dark):
    page = open_page(dark=dark)
    assert page.locator("#f2b-search").evaluate(CONTRAST) >= 4.5
    tab(page, "Ask")
    for one in (
        page.get_by_role("tab", name="Ask"),
        page.get_by_role("tab", name="Search"),
        page.locator("#f2b-ask"),
        page.locator("#f2b-fresh"),
        page.get_by_text("0: it is about those ticked below").first,
    ):
        one.evaluate("(one) => Promise.all(one.getAnimations().map((fading) => fading.finished))")
        assert one.evaluate(CONTRAST) >= 4.5, one


def test_what_is_empty_takes_no_room(open_page):
    page = open_page()
    height = "(one) => one.getBoundingClientRect().height"
    for name in ("search-status", "found", "own"):
        assert page.locator(f"#f2b-{name}").evaluate(height) == 0
    search(page, "two snowmen on a blue field")
    page.locator("#f2b-search-status").get_by_text("6 pictures found").wait_for(state="attached")
    page.wait_for_function("document.querySelector('#f2b-search-status').getBoundingClientRect().height == 0")


def test_every_picture_and_field_has_a_name_for_a_screen_reader(open_page):
    page = open_page()
    search(page, "two snowmen on a blue field")
    assert page.locator("#f2b-found img").first.get_attribute("alt") == gallery()[47].description
    assert page.locator("img:not([alt])").count() == 0
    tab(page, "Ask")
    page.get_by_role("checkbox", name=f"Picture 43: {gallery()[43].description}").check()
    for name in ("Question about the pictures", "Also answer uncompressed"):
        assert page.get_by_label(name).count() == 1
    assert page.locator("#f2b-ask-pick input:not([aria-label]), img:not([alt])").count() == 0


def test_no_request_leaves_this_machine(open_page, space):
    page = open_page()
    search(page, "two snowmen on a blue field")
    tab(page, "Look inside")
    page.wait_for_timeout(500)  # for what the page would load late
    page.goto(space.url + "?view=api")
    page.wait_for_timeout(500)
    assert [url for url in page.asked if not url.startswith((space.url, "data:", "blob:"))] == []
    assert len(page.asked) > 10


# Pictures for the documentation


def test_picture_of_each_tab_is_taken(open_page, tmp_path):
    folder = Path(os.environ.get("FWD2BOT_SPACE_PICTURES", tmp_path))  # docs/ with `make space-pictures`
    page = open_page()
    search(page, "two snowmen on a blue field")
    take(page, folder, "search", 1300)
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    answers(page)
    take(page, folder, "ask", 1350)
    tab(page, "Look inside")
    page.check("#f2b-look-pick input[value=gallery-43]")
    page.click("#f2b-look")
    page.wait_for_selector("#f2b-inside ol img")
    take(page, folder, "look", 1400)
