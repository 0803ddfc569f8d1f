"""The page of the Space. What it shows is made in `views`, what it does in `service`."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from fwd2bot.pipelines.embedded import showcase

from . import browser_side as browser
from . import views
from .checks import MAX_ASKED
from .collection import Hit, Shipped
from .endpoints import add_endpoints
from .inputs import nearest, sent, within
from .service import Service
from .uploads import MAX_FILE_BYTES, MAX_FILES, MEGABYTE, Upload, VisitorError, arrived, refusals
from .visitors import AskedTwiceError, ConversationEndedError, SupersededError
from .waiting import drop_waiting, in_turn

logger = logging.getLogger(__name__)

TITLE = "Fwd2Bot: compress a picture once, find it and ask about it ever after"
MODEL = "model"  # the concurrency id of all events that need it
INTRO = """# Fwd2Bot
The vision-language model here reads a picture as {tokens} tokens. With **Fwd2Bot** it compresses them, once, into 1 to
{longest} *summary tokens*, as many as the sliders **k** say. From these alone the picture is found (**Search**) and
talked about (**Ask**, beside the uncompressed answer and what both cost). **Look inside** shows what they hold."""
# Of the checkpoint inside the package.
OF_DRAWN_SCENES = """It is a small one, trained on **drawn scenes** as in the gallery and on single questions: about
photographs it says nothing true, and from the second question of a conversation on it is often wrong."""
UPLOAD = f"Add or paste up to {MAX_FILES} pictures of {MAX_FILE_BYTES // MEGABYTE} MB"
FAILED = "Something went wrong on the server, which has noted it. Try again, or reload the page."


def told(status: Any) -> Callable[[Callable], Callable]:
    """Show what a handler raises as a message in `status`; what the visitor cannot mend is logged, and not shown."""

    def decorate(handler: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
        @functools.wraps(handler)
        def run(*args: Any, **kwargs: Any) -> Iterator[dict]:
            try:
                yield from handler(*args, **kwargs)
            except VisitorError as error:
                yield {status: views.message(str(error))}
            except Exception:
                logger.exception("A handler of the page failed.")
                yield {status: views.message(FAILED)}

        return run

    return decorate


def intro(service: Service) -> str:
    shown = next((one for one in service.collection.pictures if one.jpeg is not None), None)
    tokens = "many" if shown is None else f"{service.image_tokens(shown.image()):,}"
    return INTRO.format(tokens=tokens, longest=service.max_length)


def build(service: Service) -> gr.Blocks:
    """The page on a service; the model serves as many visitors at once as the service says, the others wait."""
    of_model = {"concurrency_id": MODEL, "concurrency_limit": service.concurrency}
    shared = {**of_model, "api_visibility": "private"}
    longest = service.max_length
    usual = min(8, longest)
    asked = showcase()
    examples = asked if isinstance(service.collection, Shipped) else {"queries": [], "questions": []}
    queries = [(one["text"], None) for one in examples["queries"]]
    questions = [(one["text"], f"gallery-{one['file'].split('.')[0]}") for one in examples["questions"]]
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(intro(service))
        if service.is_embedded:
            gr.Markdown(OF_DRAWN_SCENES)
        with gr.Tabs():
            with gr.Tab("Search", id="search"):
                files = sent(gr.File(label=UPLOAD, file_count="multiple", elem_id="f2b-upload", height=140))
                gr.HTML("<p></p>", elem_id="f2b-held", js_on_load=browser.LIVE)
                refuse = gr.Button("refuse", visible="hidden", elem_id="f2b-refuse")
                search_status = gr.HTML(elem_id="f2b-search-status", js_on_load=browser.LIVE)
                with gr.Row():
                    query = gr.Textbox(
                        label="Find pictures that show …",
                        placeholder=asked["queries"][1]["text"],
                        elem_id="f2b-query",
                        scale=3,
                        min_width=280,
                        max_lines=3,
                    )
                    search = gr.Button("Search", variant="primary", elem_id="f2b-search")
                gr.HTML(views.tries(queries, "#f2b-query", "#f2b-search"))
                with gr.Row():
                    search_k = within(gr.Slider(1, longest, usual, step=1, label="k, summary tokens of each picture"))
                    like = sent(gr.UploadButton("Search with a picture instead", elem_id="f2b-like"))
                found = gr.HTML(elem_id="f2b-found")
                own_seen = gr.HTML(elem_id="f2b-own")
                remove = gr.Button("Remove my pictures", elem_id="f2b-remove", visible=False)
                gr.HTML(views.tiles(service.collection.pictures, "Pictures that are here for everybody", "all"))
            with gr.Tab("Ask", id="ask"):
                with gr.Row():
                    question = gr.Textbox(
                        label="Question about the pictures",
                        placeholder=asked["questions"][0]["text"],
                        elem_id="f2b-question",
                        scale=3,
                        min_width=280,
                        max_lines=3,
                    )
                    ask = gr.Button("Ask", variant="primary", elem_id="f2b-ask")
                    fresh = gr.Button("New conversation", elem_id="f2b-fresh")
                gr.HTML(views.tries(questions, "#f2b-question", "#f2b-ask"))
                # Above what is set and chosen, so that a small window shows them too.
                ask_status = gr.HTML(elem_id="f2b-ask-status", js_on_load=browser.LIVE)
                talk = gr.HTML(elem_id="f2b-talk", js_on_load=browser.ANSWERED)
                costs = gr.HTML(elem_id="f2b-costs")
                with gr.Row(elem_id="f2b-settings"):
                    ask_k = within(gr.Slider(1, longest, usual, step=1, label="k, summary tokens of each picture"))
                    find = within(
                        gr.Slider(
                            0,
                            MAX_ASKED,
                            0,
                            step=1,
                            label="Pictures for the question to find",
                            info="0: it is about those ticked below",
                        )
                    )
                    both = gr.Checkbox(True, label="Also answer uncompressed")
                with gr.Column(elem_id="f2b-ask-pick"):
                    gr.HTML("<p>No picture chosen.</p>", elem_id="f2b-count", js_on_load=browser.LIVE)
                    own_asked = gr.HTML(js_on_load=browser.KEEP_TICKS)
                    gr.HTML(views.tiles(service.collection.pictures, "Pictures to ask about", "ask", "checkbox"))
            with gr.Tab("Look inside", id="look"):
                texts = gr.Textbox(
                    label="Texts to compare the picture with, one a line",
                    value="\n".join(one["text"] for one in asked["queries"]),
                    lines=3,
                )
                with gr.Row():
                    look_k = within(
                        gr.Slider(1, longest, usual, step=1, label="k, summary tokens of the picture", min_width=240)
                    )
                    look = gr.Button("Look inside", variant="primary", elem_id="f2b-look")
                look_status = gr.HTML(elem_id="f2b-look-status", js_on_load=browser.LIVE)
                inside = gr.HTML(elem_id="f2b-inside")
                with gr.Column(elem_id="f2b-look-pick"):
                    own_looked = gr.HTML()
                    pictures = service.collection.pictures
                    first = pictures[0].id if pictures else None
                    gr.HTML(views.tiles(pictures, "Picture to look into", "look", "radio", chosen=first))
        chosen, chosen_one, refused, number = (gr.JSON(visible=False) for _ in range(4))

        def own_views(session: str) -> dict:
            own = service.own(session)
            return {
                own_seen: views.tiles(own, "Your pictures, for this visit alone", "own"),
                own_asked: views.tiles(own, "Your pictures", "ask", "checkbox"),
                own_looked: views.tiles(own, "Your pictures", "look", "radio"),
                remove: gr.update(visible=bool(own)),
            }

        @told(search_status)
        def add(
            paths: list[str] | None,
            left_out: dict,
            removals: int,
            request: gr.Request,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> Iterator[dict]:
            if not paths:
                return
            with arrived(paths) as uploads:
                added = service.add(
                    request.session_hash,
                    uploads,
                    lambda done, total: progress((done, total), desc="compressing", unit="pictures"),
                    removals=removals,
                )
            added.problems += refusals(left_out)
            yield {search_status: views.added(added), **own_views(request.session_hash)}

        @told(search_status)
        def say_refused(left_out: dict, request: gr.Request) -> Iterator[dict]:
            shows = {search_status: views.message(" ".join(refusals(left_out)))}
            if isinstance(left_out, dict) and left_out.get("query") is True:  # a search, which has failed
                service.forget_search(request.session_hash)
                shows[found] = ""
            yield shows

        def shown(hits: list[Hit], length: int) -> dict:
            return {found: views.hits(hits, length), search_status: views.heard(f"{len(hits)} pictures found")}

        def searched(session: str, query: str | Upload, length: int) -> Iterator[dict]:
            yield {found: "", search_status: ""}
            try:
                yield shown(service.search(session, query, length), length)
            except SupersededError:  # by a search of which the page shows the hits
                return

        @told(search_status)
        def search_text(text: str, length: int, request: gr.Request) -> Iterator[dict]:
            yield from searched(request.session_hash, text, length)

        @told(search_status)
        def search_picture(path: str, length: int, request: gr.Request) -> Iterator[dict]:
            with arrived(path) as [upload]:
                yield from searched(request.session_hash, upload, length)

        @told(search_status)
        def rerank(typed: Any, request: gr.Request) -> Iterator[dict]:
            length = nearest(search_k, typed)
            hits = service.rerank(request.session_hash, length)
            # Without a search, what the page says of one that failed stays.
            yield {
                search_k: gr.skip() if typed == length else length,
                **(shown(hits, length) if hits else {search_status: gr.skip()}),
            }

        @told(search_status)
        def remove_own(removals: int, request: gr.Request) -> Iterator[dict]:
            service.remove_own(request.session_hash, removals)
            words = views.message("Your pictures are forgotten.", "status")
            yield {search_status: words, found: "", talk: "", costs: "", inside: "", **own_views(request.session_hash)}

        @in_turn(lambda inputs, earlier: inputs[5] == earlier[5], drops_repeats=True)  # in the same conversation
        @told(ask_status)
        def answer(
            text: str, ids: list[str], length: int, count: int, uncompressed: bool, talks: int, request: gr.Request
        ) -> Iterator[dict]:
            yield {ask_status: ""}
            stream = service.ask(
                request.session_hash,
                text,
                ids or [],
                length,
                find=count,
                uncompressed=uncompressed,
                number=talks,
            )
            try:
                for exchange in stream:
                    done = exchange.complete
                    yield {
                        talk: views.conversation(exchange),
                        costs: views.comparison(exchange),
                        **({ask_status: views.heard(views.completed(exchange))} if done else {}),
                    }
            except AskedTwiceError:  # the answer to the first of the two is what the page shows
                return
            except ConversationEndedError:  # the last that comes of it, whatever the page has not yet shown before
                if not service.is_in_conversation(request.session_hash):  # the new one, which the page shows
                    yield {talk: "", costs: ""}

        @told(ask_status)
        def forget(talks: int, request: gr.Request) -> Iterator[dict]:
            service.new_conversation(request.session_hash, talks)
            if not service.is_in_conversation(request.session_hash):  # with a question that came before this
                yield {talk: "", costs: "", ask_status: ""}

        async def drop_older(talks: int, request: gr.Request) -> None:
            """Questions of an earlier conversation which still wait for their turn."""
            if type(talks) is not int:
                return
            await drop_waiting(
                page, request.session_hash, answering["id"], lambda given: type(given[5]) is int and given[5] < talks
            )

        @told(look_status)
        def look_inside(ids: list[str], length: int, lines: str, request: gr.Request) -> Iterator[dict]:
            yield {look_status: "", inside: ""}
            seen = service.look(request.session_hash, (ids or [None])[0], length, lines.splitlines())
            yield {inside: views.looked(seen), look_status: views.heard(f"{seen.picture.title} is shown below")}

        own = [own_seen, own_asked, own_looked, remove]
        in_browser = {"fn": None, "show_progress": "hidden", "api_visibility": "private"}
        quick = {"api_visibility": "private", "concurrency_limit": 4, "show_progress": "hidden"}
        # Taken out of the widget here and at once: clearing it later would take out what has come meanwhile.
        files.upload(inputs=files, outputs=files, js=browser.KEEP_ARRIVED, trigger_mode="multiple", **in_browser)
        adding = files.upload(
            add,
            [files, refused, number],
            [search_status, *own],
            js=browser.given(3, x0=browser.ARRIVED, x1=browser.REFUSED, x2=browser.REMOVALS_BEFORE),
            show_progress_on=search_status,
            trigger_mode="multiple",  # a batch may come while the one before is compressed
            **shared,
        )
        for ends in (adding.then, adding.failure):  # Gradio's `then` comes after no failure, such as a full queue's
            ends(js=browser.ADDED, **in_browser)
        refuse.click(say_refused, refused, [search_status, found], js=browser.given(1, x0=browser.REFUSED), **quick)
        gr.on(
            [search.click, query.submit],
            search_text,
            [query, search_k],
            [found, search_status],
            trigger_mode="always_last",
            **shared,
        )
        like.upload(search_picture, [like, search_k], [found, search_status], trigger_mode="always_last", **shared)
        search_k.change(
            rerank, search_k, [found, search_status, search_k], trigger_mode="always_last", preprocess=False, **quick
        )
        remove.click(
            remove_own,
            number,
            [search_status, found, talk, costs, inside, *own],
            js=browser.given(1, x0=browser.REMOVE),
            **quick,
        ).then(js=browser.FOCUS_UPLOAD, **in_browser)
        answering = gr.on(
            [ask.click, question.submit],
            answer,
            [question, chosen, ask_k, find, both, number],
            [ask_status, talk, costs],
            js=browser.given(6, x0=browser.ASK, x1=browser.ticked("#f2b-ask-pick"), x5=browser.CONVERSATION),
            show_progress_on=ask_status,
            trigger_mode="multiple",  # the service puts them in order, and answers none twice
            **shared,
        )
        fresh.click(
            forget,
            number,
            [talk, costs, ask_status],
            js=browser.given(1, x0=browser.NEXT_CONVERSATION),
            trigger_mode="multiple",
            **quick,
        ).then(drop_older, number, None, js=browser.given(1, x0=browser.CONVERSATION), **quick)
        look.click(
            look_inside,
            [chosen_one, look_k, texts],
            [inside, look_status],
            js=browser.given(3, x0=browser.ticked("#f2b-look-pick")),
            trigger_mode="always_last",
            **shared,
        )
        add_endpoints(page, service, of_model)
        page.load(None, js=browser.PAGE)

        def leave(request: gr.Request) -> None:
            service.visitors.leave(request.session_hash)

        page.unload(leave)
    return page


def build_failed(reason: str) -> gr.Blocks:
    """The page of a Space whose model or store cannot be loaded: it says what to do."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown("# Fwd2Bot")
        gr.HTML(views.message(f"This Space cannot start. {reason}"))
    return page
