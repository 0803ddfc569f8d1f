"""The page in a real browser: a new conversation while an answer to the one before streams, or waits."""

import threading

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_steps import ASKED, add, answers, ask, joins, own_file, search, settle, tab, until, until_joined

from fwd2bot.pipelines.embedded import gallery

DESCRIBE = "Describe the picture."
TURNS = "document.querySelectorAll('#f2b-talk .f2b-turn').length"


class Held:
    """The first answer from summaries, which stops after a few words until `go` is called; each token is counted.

    Attributes:
        words: tokens of these. tokens: of all answers. ended: set when the first answer is.
    """

    WORDS = 8  # the answer to `DESCRIBE` has more than twenty tokens

    def __init__(self, model):
        self._generate = model.generate_from_summary
        self._answers, self._go = 0, threading.Event()
        self.words, self.tokens, self.ended = self.WORDS, 0, threading.Event()

    def generate(self, summary, **kwargs):
        self._answers += 1
        first = self._answers == 1
        kwargs["stopping_criteria"].insert(0, self._after_the_first if first else self._count)
        try:
            return self._generate(summary, **kwargs)
        finally:
            if first:
                self.ended.set()

    def _after_the_first(self, ids, scores, **kwargs):
        if self.tokens + 1 >= self.words:
            assert self._go.wait(60)
        return self._count(ids, scores)

    def _count(self, ids, scores, **kwargs):
        self.tokens += 1
        return torch.zeros(len(ids), dtype=torch.bool)

    def go(self):
        self._go.set()
        assert not self._answers or self.ended.wait(60)


@pytest.fixture
def held(service, monkeypatch):
    answer = Held(service.model)
    monkeypatch.setattr(service.model, "generate_from_summary", answer.generate)
    yield answer
    answer.go()


def is_empty(page):
    return not page.inner_text("#f2b-talk").strip() and not page.inner_text("#f2b-costs").strip()


@pytest.mark.parametrize("when", ["at once", "while it is sent", "while it streams"])
def test_new_conversation_ends_the_answer_and_clears_the_page_for_good(open_page, space, held, when):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    if when == "while it is sent":
        page.wait_for_timeout(20)
    elif when == "while it streams":
        page.wait_for_selector("#f2b-talk .f2b-turn")
    page.click("#f2b-fresh")
    page.wait_for_function(f"{TURNS} == 0")
    page.wait_for_function("!document.querySelector('#f2b-ask-status .eta-bar, #f2b-ask-status .progress-text')")
    settle(page, space)
    held.go()
    assert is_empty(page) and held.tokens <= held.WORDS
    page.get_by_label("Question about the pictures").fill("")
    ask(page, ASKED)
    assert answers(page) == ["3", "3"]


def test_answer_after_a_new_conversation_is_its_first(open_page, held):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    page.click("#f2b-fresh")
    page.wait_for_function(f"{TURNS} == 0")
    ask(page, ASKED)
    assert answers(page) == ["3", "3"]
    assert page.locator("#f2b-talk .f2b-turn").count() == 1


def test_question_that_is_typed_again_while_it_is_answered_stays_in_its_box(open_page, held):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    box = page.get_by_label("Question about the pictures")
    page.wait_for_function("!document.querySelector('#f2b-question textarea').value")
    box.fill(DESCRIBE)
    held.go()
    assert answers(page)
    assert box.input_value() == DESCRIBE


def test_removing_the_pictures_ends_the_answer_about_them(open_page, space, held):
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
    settle(page, space)
    held.go()
    assert is_empty(page) and held.tokens <= held.WORDS


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


def test_question_asked_while_another_is_answered_is_the_next_and_what_is_typed_stays(open_page, held):
    page = open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    ask(page, ASKED)
    page.get_by_label("Question about the pictures").fill("What I")
    held.go()
    page.wait_for_function(f"{TURNS} == 2")
    asked = page.locator("#f2b-talk .f2b-question").all_inner_texts()
    assert asked == [DESCRIBE, ASKED] and len(answers(page)) == 4
    assert page.get_by_label("Question about the pictures").input_value() == "What I"


def test_question_that_is_sent_twice_is_answered_once(open_page, space, held):
    page = open_page()
    tab(page, "Ask")
    page.check("#f2b-ask-pick input[value=gallery-43]")
    page.get_by_label("Question about the pictures").fill(ASKED)
    held.words = 1
    joined = joins(page)
    page.dblclick("#f2b-ask")
    until_joined(page, joined, 2)
    until(lambda: len(space.page._queue.event_ids_to_events) == 1, "the second one has ended")
    held.go()
    assert answers(page) == ["3", "3"]
    settle(page, space)
    assert page.locator("#f2b-talk .f2b-question").all_inner_texts() == [ASKED]
    assert page.get_by_label("Question about the pictures").input_value() == ""


def test_question_that_is_sent_twice_and_waits_is_answered_once(open_page, space, wait_to_compress):
    page, client = open_page(), Client(space.url, verbose=False)
    jobs = [client.submit(handle_file(str(gallery()[one].path)), 1, api_name="/compress") for one in (1, 2)]
    until(lambda: len(space.page._queue.event_ids_to_events) == 2, "both places are taken")
    tab(page, "Ask")
    page.check("#f2b-ask-pick input[value=gallery-43]")
    page.get_by_label("Question about the pictures").fill(ASKED)
    joined = joins(page)
    page.dblclick("#f2b-ask")
    until_joined(page, joined, 2)
    wait_to_compress.set()
    assert answers(page) == ["3", "3"]
    settle(page, space)
    assert page.locator("#f2b-talk .f2b-question").all_inner_texts() == [ASKED]
    for job in jobs:
        job.result(timeout=60)
    client.close()


def test_question_that_waits_for_the_one_before_it_takes_no_place_from_others(open_page, space, held):
    page, other = open_page(), open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    page.get_by_label("Question about the pictures").fill(ASKED)
    joined = joins(page)
    page.dblclick("#f2b-ask")
    until_joined(page, joined, 2)
    tab(other, "Ask")
    ask(other, ASKED, "gallery-43")
    assert answers(other) == ["3", "3"]  # of two places one is taken
    assert page.locator("#f2b-talk .f2b-turn").count() == 1
    held.go()
    page.wait_for_function(f"{TURNS} == 2")
    settle(page, space)
    assert page.locator("#f2b-talk .f2b-question").all_inner_texts() == [DESCRIBE, ASKED]


def test_question_of_a_program_that_waits_for_the_one_before_it_takes_no_place_from_others(space, held):
    client, other = (Client(space.url, verbose=False) for _ in range(2))
    asked = [client.submit(DESCRIBE, ["gallery-43"], 0, 8, False, False, api_name="/ask")]
    until(lambda: held.tokens, "the first answer is being made")
    asked.append(client.submit(ASKED, ["gallery-43"], 0, 8, False, False, api_name="/ask"))
    until(lambda: len(space.page._queue.event_ids_to_events) == 2, "the second question waits")
    said = other.submit(ASKED, ["gallery-43"], 0, 8, False, False, api_name="/ask").result(timeout=60)
    assert said["answer"] == "3" and not any(job.done() for job in asked)
    held.go()
    assert [bool(job.result(timeout=60)["answer"]) for job in asked] == [True, True]
    client.close()
    other.close()


def test_question_after_a_new_conversation_does_not_wait_for_one_that_still_looks_for_its_pictures(
    open_page, space, service, monkeypatch
):
    page = open_page()
    tab(page, "Ask")
    compress, begun, go = service._compress_texts, threading.Event(), threading.Event()

    def waits(texts):
        begun.set()
        assert go.wait(30)
        return compress(texts)

    monkeypatch.setattr(service, "_compress_texts", waits)
    page.get_by_label("number input for Pictures for the question to find").fill("1")
    page.keyboard.press("Tab")
    ask(page, DESCRIBE)
    assert begun.wait(20)
    page.click("#f2b-fresh")
    page.get_by_label("number input for Pictures for the question to find").fill("0")
    page.keyboard.press("Tab")
    ask(page, ASKED, "gallery-43")
    assert answers(page) == ["3", "3"]
    go.set()  # and the end of the first one leaves what the page shows
    settle(page, space)
    assert page.locator("#f2b-talk .f2b-question").all_inner_texts() == [ASKED] and not is_empty(page)


def test_question_about_other_pictures_says_that_it_begins_a_conversation(open_page):
    page = open_page()
    tab(page, "Ask")
    ask(page, ASKED, "gallery-43")
    answers(page)
    page.uncheck("#f2b-ask-pick input[value=gallery-43]")
    ask(page, "What colour is the background?", "gallery-47")
    page.get_by_text("A new conversation, since the pictures are others.").wait_for()
    assert page.locator("#f2b-talk .f2b-turn").count() == 1
    ask(page, "How many snowmen are there?")
    page.get_by_text("trained on single questions: from the second one on").wait_for()


def test_visitor_of_whom_four_questions_wait_is_told_and_others_are_served(open_page, space, held):
    page, other = open_page(), open_page()
    tab(page, "Ask")
    ask(page, DESCRIBE, "gallery-43")
    page.wait_for_selector("#f2b-talk .f2b-turn")
    for number in range(4):
        ask(page, f"{ASKED} {number}")
        until(lambda number=number: len(space.page._queue.event_ids_to_events) == number + 2, "it is in the queue")
    ask(page, ASKED)
    page.get_by_text("4 of your requests of this kind wait already, and 4 in all.").wait_for()
    assert page.get_by_label("Question about the pictures").input_value() == ASKED
    tab(page, "Search")
    assert search(page, "two snowmen on a blue field")[0] == "1. Picture 47"
    tab(other, "Ask")
    ask(other, ASKED, "gallery-43")
    assert answers(other) == ["3", "3"]
    held.go()
    tab(page, "Ask")
    page.wait_for_function(f"{TURNS} == 5")


def test_program_of_which_four_calls_wait_is_refused_the_next(space, service, monkeypatch):
    compress, go = service._compress_texts, threading.Event()

    def waits(texts):
        assert go.wait(60)
        return compress(texts)

    monkeypatch.setattr(service, "_compress_texts", waits)
    client = Client(space.url, verbose=False)
    jobs = []
    for number in range(6):
        jobs.append(client.submit(f"a dog {number}", 8, 1, api_name="/search"))
        until(lambda number=number: len(space.page._queue.event_ids_to_events) == number + 1, "it is in the queue")
    with pytest.raises(Exception, match="429 Too Many Requests"):
        client.predict("a dog", 8, 1, api_name="/search")
    go.set()
    assert all(len(job.result(timeout=60)) == 1 for job in jobs)
    client.close()


def test_fresh_question_of_a_program_ends_the_one_that_is_answered_and_the_one_that_waits(space, held):
    client = Client(space.url, verbose=False)
    first = client.submit(DESCRIBE, ["gallery-43"], 0, 8, False, api_name="/ask")
    until(lambda: held.tokens, "the first answer is being made")
    second = client.submit("Is there a dog?", ["gallery-43"], 0, 8, False, api_name="/ask")
    until(lambda: len(space.page._queue.event_ids_to_events) == 2, "the second question waits")
    said = client.predict(ASKED, ["gallery-43"], 0, 8, False, True, api_name="/ask")
    assert said["answer"] == "3"
    for before in (first, second):
        with pytest.raises(AppError, match="A new conversation was begun before this answer was complete"):
            before.result(timeout=30)
    client.close()
