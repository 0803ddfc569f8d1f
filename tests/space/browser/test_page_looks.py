"""The page in a real browser: narrow, dark, by keyboard, for a screen reader, and in pictures for docs."""

import os
import re
from io import BytesIO
from pathlib import Path

import pytest
from page_steps import ASKED, add, answers, ask, is_wider_than_the_window, large_file, search, settle, tab
from PIL import Image

from fwd2bot.pipelines.embedded import gallery


def take(page, folder, name, height):
    """A picture of the page for the documentation, in few enough bytes."""
    page.mouse.move(0, 0)
    content = page.screenshot(clip={"x": 100, "y": 0, "width": 800, "height": height}, full_page=True)
    path = folder / f"space-{name}.png"
    with Image.open(BytesIO(content)) as picture:
        picture.convert("RGB").quantize(255).save(path, optimize=True)
    assert path.stat().st_size < 200_000


CLIPPED = """() => [...document.querySelectorAll('h1, h3, h4, label, label span, th, td, button, p, .f2b-message')]
  .filter((one) => one.checkVisibility() && one.innerText?.trim() && one.getClientRects().length)
  .filter((one) => {
    const range = document.createRange();
    range.selectNodeContents(one);
    return [...range.getClientRects()].some((part) => part.right > innerWidth - 8 || part.left < 0)
      || one.tagName == 'TH' && one.scrollWidth > one.clientWidth;
  }).map((one) => one.outerHTML.slice(0, 200))"""  # text that goes beyond the window, or a heading beyond its column


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 400])
def test_every_tab_fits_into_a_narrow_window(open_page, width, dark):
    page = open_page(width=width, height=800, dark=dark)
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    add(page, large_file(f"{'x' * 40}.png"))
    assert page.evaluate(CLIPPED) == []
    search(page, "two snowmen on a blue field")
    assert not is_wider_than_the_window(page)
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    answers(page)
    assert not is_wider_than_the_window(page)
    assert page.evaluate(CLIPPED) == []
    tab(page, "Look inside")
    page.check("#f2b-look-pick input[value=gallery-43]")
    page.click("#f2b-look")
    page.wait_for_selector("#f2b-inside ol img")
    assert not is_wider_than_the_window(page)
    assert page.evaluate(CLIPPED) == []


def test_footer_has_nothing_but_its_link(open_page):
    page = open_page()
    assert page.inner_text("footer").split("\n")[0].strip() == "Use via API"
    assert "·" not in page.inner_text("footer")


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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_has_the_focus_is_seen(open_page, dark):
    page = open_page(dark=dark)
    for one in (
        page.get_by_label("Find pictures that show"),
        page.locator("#f2b-search"),
        page.get_by_label("range slider for k, summary tokens of each picture").first,
        page.locator(".f2b-try").first,
        page.locator("#f2b-upload button").first,
    ):
        page.evaluate("document.body.focus()")
        tab_to(page, one)
        one.evaluate("(one) => Promise.all(one.getAnimations().map((fading) => fading.finished))")
        style = "(one) => [getComputedStyle(one).outlineStyle, parseFloat(getComputedStyle(one).outlineWidth)]"
        assert one.evaluate(style) == ["solid", 2], one


def test_focus_goes_to_the_upload_when_the_button_that_had_it_is_gone(open_page):
    page = open_page()
    add(page, {"name": "a.png", "mimeType": "image/png", "buffer": gallery()[3].path.read_bytes()})
    page.focus("#f2b-remove")
    page.keyboard.press("Enter")
    page.wait_for_selector("#f2b-remove", state="hidden")
    page.wait_for_function("document.querySelector('#f2b-upload button') === document.activeElement")


def test_answer_and_error_are_seen_without_scrolling_in_a_small_window(open_page):
    page = open_page(width=360, height=740)
    tab(page, "Ask")
    ask(page, ASKED)  # without a picture
    seen = """(place) => { const box = document.querySelector(place)?.getBoundingClientRect();
      return box && box.top >= 0 && box.bottom <= innerHeight; }"""
    page.wait_for_function(seen, arg="#f2b-ask-status .f2b-alert")
    page.check("#f2b-ask-pick input[value=gallery-43]")
    page.evaluate("scrollTo(0, 0)")  # before the answer comes, which scrolls to itself
    page.click("#f2b-ask")
    page.wait_for_function(seen, arg="#f2b-talk .f2b-turn .f2b-answer")


def test_example_is_asked_by_one_click(open_page):
    page = open_page()
    page.locator(".f2b-try:visible").nth(1).click()
    page.wait_for_selector("#f2b-found li:has-text('1. Picture 47')")
    tab(page, "Ask")
    page.check("#f2b-ask-pick input[value=gallery-01]")
    page.locator(".f2b-try:visible").first.click()
    assert answers(page) == ["3", "3"]
    assert page.locator("#f2b-count").inner_text().strip() == "1 picture chosen."


def test_introduction_says_how_many_tokens_a_picture_is(open_page):
    page = open_page()
    assert "reads a picture as 64 tokens" in page.inner_text("body")


def test_example_of_the_api_page_is_a_file_that_would_be_taken(open_page):
    page = open_page()
    page.get_by_role("button", name="Use via API").click()
    page.wait_for_function("document.querySelector('.api-docs')?.innerText.includes('/compress')")
    shown = re.findall(r"handle_file\(([^)]*)\)", page.inner_text(".api-docs"))
    assert set(shown) == {"'photo.jpg'"}


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
    settle(page, space)
    page.get_by_role("button", name="Use via API").click()
    page.wait_for_function("document.querySelector('.api-docs')?.innerText.includes('/compress')")
    settle(page, space)
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
