"""The page in a real browser: pictures that come while others arrive, wait, or are removed."""

from page_steps import add, own_file, settle, toasts, until

from fwd2bot.space_app import waiting


def bring(page, numbers):
    for number in numbers:
        page.set_input_files("#f2b-upload input[type=file]", own_file(number, f"{number}.png"))
        page.wait_for_function("!window.f2b.sent")  # it has arrived, or is kept back


def test_pictures_that_come_while_others_wait_are_kept_back_and_none_is_lost(open_page, space, wait_to_compress):
    page = open_page()
    bring(page, range(7))
    until(lambda: len(space.page._queue.event_ids_to_events) == 4, "as many as may wait are with the server")
    page.get_by_text("3 more batches of pictures will be sent when others are done.").wait_for()
    wait_to_compress.set()
    page.wait_for_function("document.querySelectorAll('#f2b-own li').length == 7")
    assert sorted(page.locator("#f2b-own li").all_inner_texts()) == [f"{number}.png" for number in range(7)]
    settle(page, space)
    assert toasts(page) == [] and page.inner_text("#f2b-held") == ""


def test_pictures_that_wait_do_not_come_back_after_all_were_removed(open_page, space, service, wait_to_compress):
    page = open_page()
    wait_to_compress.set()
    add(page, own_file(43, "first.png"))
    page.wait_for_selector("#f2b-own img")
    wait_to_compress.clear()
    bring(page, range(6))  # two are served, two wait, two are kept back
    until(lambda: len(space.page._queue.event_ids_to_events) == 4, "as many as may wait are with the server")
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-own img", state="detached")
    wait_to_compress.set()
    page.get_by_text("Your pictures were removed while others were added.").first.wait_for()
    settle(page, space)
    assert page.locator("#f2b-own li").count() == 0
    page.set_input_files("#f2b-upload input[type=file]", own_file(7, "after.png"))
    page.wait_for_selector("#f2b-own img")
    assert page.locator("#f2b-own li").all_inner_texts() == ["after.png"]


def test_page_goes_on_after_pictures_that_the_queue_has_refused(open_page, monkeypatch):
    page = open_page()
    with monkeypatch.context() as patch:
        patch.setattr(waiting, "MAX_WAITING_OF_ONE", 0)
        bring(page, range(5))
        page.get_by_text("0 of your requests of this kind wait already").first.wait_for()
        page.wait_for_function("window.f2b.adding == 0 && !window.f2b.held.length")
    add(page, own_file(43, "mine.png"))
    page.wait_for_selector("#f2b-own img")


def hold_uploads(page):
    """Uploads stay on the line; `release` lets them go on."""
    on_the_line, released = [], []
    page.route("**/gradio_api/upload?*", lambda route: route.continue_() if released else on_the_line.append(route))

    def release():
        released.append(True)
        for route in on_the_line:
            route.continue_()

    return on_the_line, release


def test_pictures_that_arrive_while_all_are_removed_do_not_come_back(open_page, space):
    page = open_page()
    add(page, own_file(43, "first.png"))
    page.wait_for_selector("#f2b-own img")
    on_the_line, release = hold_uploads(page)
    page.set_input_files("#f2b-upload input[type=file]", own_file(3, "late.png"))
    until(lambda: page.wait_for_timeout(20) or on_the_line, "it is on the line")
    page.click("#f2b-remove")
    page.wait_for_selector("#f2b-own img", state="detached")
    release()
    page.get_by_text("Your pictures were removed while others were added.").first.wait_for()
    settle(page, space)
    assert page.locator("#f2b-own li").count() == 0


def test_file_that_is_dropped_while_others_arrive_is_added_after_them(open_page, space):
    page = open_page()
    on_the_line, release = hold_uploads(page)
    page.set_input_files("#f2b-upload input[type=file]", own_file(3, "first.png"))
    until(lambda: page.wait_for_timeout(20) or on_the_line, "it is on the line")
    drop = """([name, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' }));
      const place = document.querySelector('#f2b-upload .wrap') ?? document.querySelector('#f2b-upload');
      return ['dragover', 'drop'].map((kind) => !place.dispatchEvent(
        new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true })));
    }"""
    taken = page.evaluate(drop, ["second.png", list(own_file(4, "")["buffer"])])
    assert taken == [True, True]  # not left to the browser, which would open the file in place of the page
    release()
    page.wait_for_function("document.querySelectorAll('#f2b-own li').length == 2")
    assert page.locator("#f2b-own li").all_inner_texts() == ["first.png", "second.png"]
