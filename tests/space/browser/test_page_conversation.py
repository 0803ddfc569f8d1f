"""The page in a real browser: a new conversation while an answer to the one before streams, or waits."""

import threading
import time

import pytest
import torch
from gradio_client import Client, handle_file
from page_steps import ASKED, add, answers, ask, own_file, tab

from fwd2bot.pipelines.embedded import gallery

DESCRIBE = "Describe the picture."
TURNS = "document.querySelectorAll('#f2b-talk .f2b-turn').length"
# Whether something is written into the conversation from now on.
WATCH = """() => { window.written = []; new MutationObserver(() => window.written.push(
  document.querySelector('#f2b-talk').innerText + document.querySelector('#f2b-costs').innerText
)).observe(document.body, { childList: true, subtree: true, characterData: true }); }"""


@pytest.fixture
def slow(service, monkeypatch):
    """Half a second for each token of an answer from summaries."""
    generate = service.model.generate_from_summary

    def waits(ids, scores, **kwargs):
        time.sleep(0.5)
        return torch.zeros(len(ids), dtype=torch.bool)

    def slowly(summary, **kwargs):
        kwargs["stopping_criteria"].append(waits)
        return generate(summary, **kwargs)

    monkeypatch.setattr(service.model, "generate_from_summary", slowly)


def is_empty(page):
    return not page.inner_text("#f2b-talk").strip() and not page.inner_text("#f2b-costs").strip()


@pytest.mark.parametrize("after", [0.0, 0.02, 1.2], ids=["at once", "while it is sent", "while it streams"])
def test_new_conversation_ends_the_answer_and_clears_the_page_for_good(open_page, slow, after):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_timeout(1000 * after)
    begin = time.monotonic()
    page.click("#f2b-fresh")
    page.wait_for_function(f"{TURNS} == 0")
    page.wait_for_function("!document.querySelector('#f2b-ask-status .eta-bar, #f2b-ask-status .progress-text')")
    assert time.monotonic() - begin < 4  # the answer has some twenty tokens
    page.wait_for_timeout(300)  # for an answer that was sent just before, in the test without a pause
    assert is_empty(page)
    page.evaluate(WATCH)
    page.wait_for_timeout(2500)
    assert not any(page.evaluate("window.written"))
    ask(page, ASKED)
    assert answers(page) == ["3", "3"]


def test_answer_after_a_new_conversation_is_its_first(open_page, slow):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    page.click("#f2b-fresh")
    page.wait_for_function(f"{TURNS} == 0")
    ask(page, ASKED)
    assert answers(page) == ["3", "3"]
    assert page.locator("#f2b-talk .f2b-turn").count() == 1


def test_removing_the_pictures_ends_the_answer_about_them(open_page, slow):
    page = open_page()
    add(page, own_file(43, "mine.png"))
    tab(page, "Ask")
    ask(page, DESCRIBE, "own-1")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    tab(page, "Search")
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-own img", state="detached")
    tab(page, "Ask")
    page.wait_for_function(f"{TURNS} == 0")
    page.evaluate(WATCH)
    page.wait_for_timeout(2000)
    assert not any(page.evaluate("window.written"))


def test_question_that_waits_is_dropped_and_the_next_one_answered(open_page, space, service, monkeypatch):
    page = open_page()
    tab(page, "Ask")
    compress, served, go = service.compress, threading.Semaphore(0), threading.Event()

    def waits(images):
        served.release()
        go.wait(30)
        return compress(images)

    monkeypatch.setattr(service, "compress", waits)
    client = Client(space.url, verbose=False)
    jobs = [client.submit(handle_file(str(gallery()[one].path)), 1, api_name="/compress") for one in (1, 2)]
    assert all(served.acquire(timeout=20) for _ in jobs)  # both places are taken
    ask(page, DESCRIBE, "gallery-44")
    page.get_by_text("queue: 1/1").first.wait_for()
    page.click("#f2b-fresh")
    page.get_by_text("queue: 1/1").first.wait_for(state="detached")
    ask(page, ASKED)
    page.get_by_text("queue: 1/1").first.wait_for()
    go.set()
    page.wait_for_selector("#f2b-talk .f2b-question")
    assert page.locator("#f2b-talk .f2b-question").all_inner_texts() == [ASKED]
    for job in jobs:
        job.result(timeout=30)
    client.close()
