"""What a visitor does in the page, for the tests in a browser."""

import threading
import time
from urllib.parse import parse_qs, urlsplit

from fwd2bot.pipelines.embedded import gallery
from fwd2bot.space_app.waiting import not_ended

ASKED = "How many carrots are in the picture?"
QUERY_FILE = "input[type=file]:not(#f2b-upload *)"  # of the button that searches with a picture


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


def large_file(name, megabytes=11):
    return {"name": name, "mimeType": "image/png", "buffer": b"x" * int(megabytes * 2**20)}


def toasts(page):
    """Gradio's own messages, which go away by themselves."""
    return page.locator(".toast-body").all_inner_texts()


def type_number(page, label, number):
    """A number into the field beside a slider; the focus stays there."""
    page.get_by_label(f"number input for {label}").first.fill(number)


def until(true, what, seconds=20):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} seconds: {what}"
        threading.Event().wait(0.02)


def settle(page, space):
    """Wait until the page has sent all that it will send, nothing is served or waits, and the page has what came."""
    queue, pause = space.page._queue, "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"

    def is_quiet():
        messages = [queue.pending_messages_per_session.get(session) for session in sessions(page)]
        return not not_ended(queue) and all(one is None or one.empty() for one in messages)

    for _ in range(2):  # what came may make the page send something
        page.evaluate(pause)
        until(is_quiet, "nothing is served or waits")
    page.evaluate(pause)


def sessions(page):
    """The ids that Gradio's client in the page gave itself; one for each time that the page was loaded."""
    queries = [parse_qs(urlsplit(url).query) for url in page.asked]
    return {session for query in queries for session in query.get("session_hash", ())}


def joins(page):
    """A list that grows with each request of the page that is in the queue, or refused there."""
    found = []
    page.on("response", lambda answer: "/queue/join" in answer.url and found.append(answer.status))
    return found


def until_joined(page, found, count):
    until(lambda: page.wait_for_timeout(20) or len(found) == count, f"{count} requests are in the queue")
