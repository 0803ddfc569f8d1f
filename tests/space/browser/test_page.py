"""The page in a real browser: what a visitor does in each tab, and two visitors at once."""

import threading

from page_steps import ASKED, QUERY_FILE, add, answers, ask, hits, message, own_file, search, settle, tab, until

from fwd2bot.pipelines.embedded import gallery

# Search


def test_sentence_finds_and_slider_ranks_anew(open_page, service, monkeypatch):
    page = open_page()
    assert search(page, "two snowmen on a blue field")[0] == "1. Picture 47"
    monkeypatch.setattr(service.model, "compress", None)  # the slider needs no model
    page.get_by_label("number input for k, summary tokens of each picture").first.fill("2")
    page.keyboard.press("Tab")
    page.wait_for_selector("#f2b-found h3:has-text('k = 2')")
    assert len(hits(page)) == 6


def test_slider_after_a_search_that_failed_does_not_bring_the_one_before(open_page, space):
    page = open_page()
    search(page, "two snowmen on a blue field")
    page.get_by_label("Find pictures that show").fill("")
    page.click("#f2b-search")
    assert "The query is empty" in message(page, "search")
    with page.expect_response(lambda answer: "/queue/join" in answer.url):
        page.get_by_label("number input for k, summary tokens of each picture").first.fill("2")
        page.keyboard.press("Tab")
    settle(page, space)
    assert "The query is empty" in message(page, "search")
    assert page.locator("#f2b-found li").count() == 0


def test_picture_finds_its_like(open_page):
    page = open_page()
    page.set_input_files(QUERY_FILE, own_file(29, "query.png"))
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


PASTE = """([name, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' }));
  document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }));
}"""


def test_batches_that_come_while_the_first_is_compressed_are_all_added(open_page, space, service, monkeypatch):
    page = open_page()
    compress, go = service.compress, threading.Event()

    def waits(images):
        assert go.wait(30)
        return compress(images)

    monkeypatch.setattr(service, "compress", waits)
    for number, name in enumerate(["one.png", "two.png", "three.png"]):
        until(lambda number=number: len(space.page._queue.event_ids_to_events) == number, "the one before was sent")
        page.set_input_files("#f2b-upload input[type=file]", own_file(number, name))
    page.evaluate(PASTE, ["pasted.png", list(gallery()[3].path.read_bytes())])
    go.set()
    page.wait_for_function("document.querySelectorAll('#f2b-own li').length == 4")
    names = sorted(page.locator("#f2b-own li").all_inner_texts())
    assert names == ["one.png", "pasted.png", "three.png", "two.png"]
    assert page.locator("#f2b-upload input[type=file]").count() == 1  # and the next ones may come


def test_search_that_is_begun_while_another_waits_is_the_one_that_is_shown(open_page, space, service, monkeypatch):
    page = open_page()
    compress, begun, go = service._compress_texts, threading.Event(), threading.Event()

    def waits(texts):
        if texts == ["a red square"]:
            begun.set()
            assert go.wait(30)
        return compress(texts)

    monkeypatch.setattr(service, "_compress_texts", waits)
    page.get_by_label("Find pictures that show").fill("a red square")
    page.click("#f2b-search")
    assert begun.wait(20)
    page.set_input_files(QUERY_FILE, own_file(29, "query.png"))
    page.wait_for_selector("#f2b-found li:has-text('1. Picture 29')")
    page.get_by_label("Find pictures that show").fill("two snowmen on a blue field")
    page.click("#f2b-search")
    go.set()
    page.wait_for_selector("#f2b-found li:has-text('1. Picture 47')")
    settle(page, space)
    assert hits(page)[0] == "1. Picture 47"


def test_pasted_picture_is_added(open_page):
    page = open_page()
    page.evaluate(PASTE, ["pasted.png", list(gallery()[3].path.read_bytes())])
    assert "1 of your pictures added" in message(page, "search")
    assert "pasted.png" in page.inner_text("#f2b-own")


def test_same_file_twice_is_taken_once_and_told(open_page):
    page = open_page()
    told = add(page, own_file(43, "one.png"), own_file(43, "again.png"))
    assert (
        told
        == "1 of your pictures added and compressed. “again.png” is the same picture as “one.png”, and is taken once."
    )
    page.set_input_files("#f2b-upload input[type=file]", own_file(43, "third.png"))
    page.get_by_text("“third.png” is here already, as “one.png”.").first.wait_for()
    assert page.locator("#f2b-own li").all_inner_texts() == ["one.png"]


def test_remove_is_offered_only_to_who_has_pictures(open_page):
    page = open_page()
    assert not page.is_visible("#f2b-remove")
    add(page, own_file(43, "one.png"))
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-remove", state="hidden")


# Ask


def test_ticked_pictures_are_counted_and_stay_ticked_when_others_arrive(open_page):
    page = open_page()
    add(page, own_file(3, "mine.png"))
    tab(page, "Ask")
    count = page.locator("#f2b-count [role=status], #f2b-count[role=status]").first
    assert count.inner_text() == "No picture chosen."
    page.check("#f2b-ask-pick input[value=own-1]")
    assert count.inner_text() == "1 picture chosen."
    for number in (43, 44):
        page.check(f"#f2b-ask-pick input[value=gallery-{number}]")
    assert count.inner_text() == "3 pictures chosen."
    tab(page, "Search")
    page.set_input_files("#f2b-upload input[type=file]", own_file(5, "more.png"))
    page.wait_for_selector("#f2b-own li:has-text('more.png')")
    tab(page, "Ask")
    assert page.is_checked("#f2b-ask-pick input[value=own-1]")
    assert count.inner_text() == "3 pictures chosen."
    tab(page, "Search")
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-own img", state="detached")
    tab(page, "Ask")
    assert count.inner_text() == "2 pictures chosen."
    for number in (1, 2, 5, 6):
        page.check(f"#f2b-ask-pick input[value=gallery-0{number}]")
    assert count.inner_text() == "6 pictures chosen; at most 5 can be asked about."


def test_answer_that_is_cut_off_says_so(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, "Describe the picture.", "gallery-43")
    for answer in answers(page):
        assert answer.endswith("… (cut off at 48 tokens)") or answer.endswith(".")
    assert "(cut off at 48 tokens)" in page.inner_text("#f2b-talk")


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
    assert "mine.png" in _held(service)
    page.close()
    until(lambda: "mine.png" not in _held(service), "it is not held")
    space.sweep()
    assert "mine.png" not in _held(service)
    kept = [state.config_values for state in space.page.state_holder.session_data.values()]
    assert "mine.png" not in str(kept)
    assert not [path for path in space.uploads.rglob("*") if path.is_file() and path.stat().st_size]


def _held(service):
    """The titles of the pictures of all visitors."""
    return [one.title for held in list(service.visitors._visitors.values()) for one in list(held.pictures.values())]
