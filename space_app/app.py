"""The page of the Space. What it shows is made in `views`, what it does in `service`."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from fwd2bot.pipelines.embedded import showcase

from . import views
from .collection import Hit
from .endpoints import add_endpoints
from .service import MAX_ASKED, Service
from .uploads import MAX_FILE_BYTES, MAX_FILES, MEGABYTE, VisitorError, read_and_delete

logger = logging.getLogger(__name__)

TITLE = "Fwd2Bot: compress a picture once, find it and ask about it ever after"
INTRO = """# Fwd2Bot
A vision-language model reads a picture as hundreds of tokens. **Fwd2Bot** compresses them once into a few *summary
tokens*, with which the picture is found and talked about from then on. Choose their number with the sliders **k**."""
# Of the checkpoint inside the package, which is the one that refuses other scripts.
OF_DRAWN_SCENES = """This small model was trained on **drawn scenes**, as those in the gallery, and on single
questions. About photographs it says nothing true, and answers get worse in a long conversation: begin a new one."""
UPLOAD = (
    f"Add pictures: drop them here, choose files, or paste (at most {MAX_FILES}, {MAX_FILE_BYTES // MEGABYTE} MB each)"
)
FAILED = "Something went wrong on the server, which has noted it. Try again, or reload the page."
CSS = """
.f2b-tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; list-style: none;
  padding: 0; margin: 8px 0; }
.f2b-small { grid-template-columns: repeat(auto-fill, 72px); }
.f2b-tiles li, .f2b-tiles label { display: flex; flex-direction: column; gap: 2px; font-size: 13px; margin: 0;
  color: var(--body-text-color); overflow-wrap: anywhere; }
.f2b-tiles img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 6px; margin: 0; }
.f2b-tiles label { cursor: pointer; position: relative; }
.f2b-tiles label input { position: absolute; left: 6px; top: 6px; width: 20px; height: 20px; }
.f2b-tiles label:has(input:checked) img { outline: 3px solid var(--color-accent); }
.f2b-tiles label:has(input:focus-visible) { outline: 3px solid var(--body-text-color); outline-offset: 2px; }
.f2b-choose { border: 0; padding: 0; margin: 0; max-height: 420px; overflow-y: auto; }
.f2b-choose legend, .f2b-table caption { font-weight: 600; text-align: left; color: var(--body-text-color); }
.f2b-bar { display: block; height: 8px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
.f2b-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 4px; }
.f2b-message { padding: 10px 12px; border-radius: 6px; border: 1px solid var(--border-color-primary);
  border-left: 6px solid #2e7d32; background: var(--background-fill-secondary); color: var(--body-text-color); }
.f2b-alert { border-left-color: #c62828; }
.f2b-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.block:has(> .wrap.hide):has(> .html-container > .prose:empty, > .html-container > .prose > .f2b-heard) { height: 0;
  margin-top: calc(-1 * var(--layout-gap)) !important; }
.block > .html-container:has(> .prose:empty, > .prose > .f2b-heard) { padding: 0; }
.dark { --color-accent: var(--primary-400); }
.f2b-missing { display: grid; place-content: center; aspect-ratio: 1; text-align: center; font-size: 12px;
  border: 1px dashed var(--border-color-primary); }
.f2b-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 10px; }
.f2b-pair > div { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 8px 12px;
  background: var(--background-fill-secondary); }
.f2b-pair h4 { margin: 0; font-size: 13px; } .f2b-answer { margin: 4px 0 0; overflow-wrap: anywhere; }
.f2b-question { font-weight: 600; margin: 12px 0 6px; overflow-wrap: anywhere; }
.f2b-table { width: 100%; table-layout: fixed; border: 0 !important; border-collapse: collapse; margin: 12px 0;
  color: var(--body-text-color); }
.f2b-table th, .f2b-table td { text-align: left; padding: 6px 8px; font-weight: 400; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.f2b-table thead th { font-weight: 600; overflow-wrap: normal; }
.f2b-table thead, .f2b-table tbody, .f2b-table tr, .f2b-table th, .f2b-table td { border-left: 0; border-right: 0;
  border-top: 0; }
.f2b-figure { margin: 0; } .f2b-figure img { max-width: 100%; min-width: 192px; max-height: 320px; }
"""
# Read out by a screen reader whenever its content changes.
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite')"
# A picture that is pasted anywhere in the page goes where chosen files go.
PASTE = """() => document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  const target = document.querySelector('#f2b-upload input[type=file]');
  if (!files.length || !target) return;
  const transfer = new DataTransfer();
  files.forEach((file) => transfer.items.add(file));
  target.files = transfer.files;
  target.dispatchEvent(new Event('change', { bubbles: true }));
})"""


def _checked(place: str, position: int, count: int) -> str:
    """JavaScript that puts the ids of the ticked pictures at `position` among `count` inputs."""
    names = [f"x{index}" for index in range(count)]
    given = list(names)
    given[position] = f"[...document.querySelectorAll('{place} input:checked')].map((one) => one.value)"
    return f"({', '.join(names)}) => [{', '.join(given)}]"


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


def build(service: Service, concurrency: int = 2) -> gr.Blocks:
    """The page on a service.

    Args:
        concurrency: how many visitors the model serves at once; the others wait in a queue.
    """
    shared = {"concurrency_id": "model", "concurrency_limit": concurrency, "api_visibility": "private"}
    longest = service.max_length
    usual = min(8, longest)
    asked = showcase()
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        if service.english_only:
            gr.Markdown(OF_DRAWN_SCENES)
        with gr.Tabs():
            with gr.Tab("Search", id="search"):
                files = gr.File(label=UPLOAD, file_count="multiple", elem_id="f2b-upload", height=140)
                search_status = gr.HTML(elem_id="f2b-search-status", js_on_load=LIVE)
                with gr.Row():
                    query = gr.Textbox(
                        label="Find pictures that show …",
                        placeholder=asked["queries"][1]["text"],
                        scale=3,
                        min_width=280,
                        max_lines=3,
                    )
                    search = gr.Button("Search", variant="primary", elem_id="f2b-search")
                with gr.Row():
                    search_k = gr.Slider(1, longest, usual, step=1, label="k, summary tokens of each picture")
                    like = gr.UploadButton("Search with a picture instead", elem_id="f2b-like")
                found = gr.HTML(elem_id="f2b-found")
                own_seen = gr.HTML(elem_id="f2b-own")
                remove = gr.Button("Remove my pictures", elem_id="f2b-remove")
                gr.HTML(views.tiles(service.collection.pictures, "Pictures that are here for everybody", "all"))
            with gr.Tab("Ask", id="ask"):
                with gr.Row():
                    question = gr.Textbox(
                        label="Question about the pictures",
                        placeholder=asked["questions"][0]["text"],
                        scale=3,
                        min_width=280,
                        max_lines=3,
                    )
                    ask = gr.Button("Ask", variant="primary", elem_id="f2b-ask")
                    fresh = gr.Button("New conversation", elem_id="f2b-fresh")
                with gr.Row():
                    ask_k = gr.Slider(1, longest, usual, step=1, label="k, summary tokens of each picture")
                    find = gr.Slider(
                        0,
                        MAX_ASKED,
                        0,
                        step=1,
                        label="Pictures for the question to find",
                        info="0: it is about those ticked below",
                    )
                    both = gr.Checkbox(True, label="Also answer uncompressed")
                ask_status = gr.HTML(elem_id="f2b-ask-status", js_on_load=LIVE)
                talk = gr.HTML(elem_id="f2b-talk")
                costs = gr.HTML(elem_id="f2b-costs")
                with gr.Column(elem_id="f2b-ask-pick"):
                    own_asked = gr.HTML()
                    gr.HTML(views.tiles(service.collection.pictures, "Pictures to ask about", "ask", "checkbox"))
            with gr.Tab("Look inside", id="look"):
                texts = gr.Textbox(
                    label="Texts to compare the picture with, one a line",
                    value="\n".join(one["text"] for one in asked["queries"]),
                    lines=3,
                )
                with gr.Row():
                    look_k = gr.Slider(1, longest, usual, step=1, label="k, summary tokens of the picture")
                    look = gr.Button("Look inside", variant="primary", elem_id="f2b-look")
                look_status = gr.HTML(elem_id="f2b-look-status", js_on_load=LIVE)
                inside = gr.HTML(elem_id="f2b-inside")
                with gr.Column(elem_id="f2b-look-pick"):
                    own_looked = gr.HTML()
                    gr.HTML(views.tiles(service.collection.pictures, "Picture to look into", "look", "radio"))
        chosen, chosen_one = gr.JSON(visible=False), gr.JSON(visible=False)

        def own_views(session: str) -> dict:
            own = service.own(session)
            return {
                own_seen: views.tiles(own, "Your pictures, for this visit alone", "own"),
                own_asked: views.tiles(own, "Your pictures", "ask", "checkbox"),
                own_looked: views.tiles(own, "Your pictures", "look", "radio"),
            }

        @told(search_status)
        def add(paths: list[str] | None, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Iterator[dict]:  # noqa: B008
            if not paths:
                return
            yield {files: None}  # the visitor may bring more meanwhile
            added, problems = service.add(
                request.session_hash,
                read_and_delete(paths),
                lambda done, total: progress((done, total), desc="compressing", unit="pictures"),
            )
            words = f"{len(added)} of your pictures added and compressed. " if added else ""
            kind = "alert" if problems else "status"
            yield {search_status: views.message(words + " ".join(problems), kind), **own_views(request.session_hash)}

        def shown(hits: list[Hit], length: int) -> dict:
            return {found: views.hits(hits, length), search_status: views.heard(f"{len(hits)} pictures found")}

        @told(search_status)
        def search_text(text: str, length: int, request: gr.Request) -> Iterator[dict]:
            yield {found: "", search_status: ""}
            yield shown(service.search(request.session_hash, text, int(length)), int(length))

        @told(search_status)
        def search_picture(path: str, length: int, request: gr.Request) -> Iterator[dict]:
            yield {found: "", search_status: ""}
            [upload] = read_and_delete(path)
            yield shown(service.search(request.session_hash, upload, int(length)), int(length))

        @told(search_status)
        def rerank(length: int, request: gr.Request) -> Iterator[dict]:
            hits = service.rerank(request.session_hash, int(length))
            # Without a search, what the page says of one that failed stays.
            yield shown(hits, int(length)) if hits else {search_status: gr.skip()}

        @told(search_status)
        def remove_own(request: gr.Request) -> Iterator[dict]:
            service.remove_own(request.session_hash)
            words = views.message("Your pictures are forgotten.", "status")
            yield {search_status: words, found: "", talk: "", costs: "", inside: "", **own_views(request.session_hash)}

        @told(ask_status)
        def answer(
            text: str, ids: list[str], length: int, count: int, uncompressed: bool, request: gr.Request
        ) -> Iterator[dict]:
            yield {ask_status: "", costs: ""}
            stream = service.ask(
                request.session_hash, text, ids or [], int(length), find=int(count), uncompressed=uncompressed
            )
            for exchange in stream:
                yield {talk: views.conversation(exchange), costs: views.comparison(exchange)}
            yield {question: "", ask_status: views.heard(views.completed(exchange))}

        @told(ask_status)
        def forget(request: gr.Request) -> Iterator[dict]:
            service.new_conversation(request.session_hash)
            yield {talk: "", costs: "", ask_status: ""}

        @told(look_status)
        def look_inside(ids: list[str], length: int, lines: str, request: gr.Request) -> Iterator[dict]:
            yield {look_status: "", inside: ""}
            seen = service.look(request.session_hash, (ids or [None])[0], int(length), lines.splitlines())
            yield {inside: views.looked(seen), look_status: views.heard(f"{seen.picture.title} is shown below")}

        own = [own_seen, own_asked, own_looked]
        quick = {"api_visibility": "private", "concurrency_limit": 4, "show_progress": "hidden"}
        files.upload(add, files, [files, search_status, *own], show_progress_on=search_status, **shared)
        gr.on([search.click, query.submit], search_text, [query, search_k], [found, search_status], **shared)
        like.upload(search_picture, [like, search_k], [found, search_status], **shared)
        search_k.change(rerank, search_k, [found, search_status], trigger_mode="always_last", **quick)
        remove.click(remove_own, None, [search_status, found, talk, costs, inside, *own], **quick)
        gr.on(
            [ask.click, question.submit],
            answer,
            [question, chosen, ask_k, find, both],
            [ask_status, talk, costs, question],
            js=_checked("#f2b-ask-pick", 1, 5),
            show_progress_on=ask_status,
            **shared,
        )
        fresh.click(forget, None, [talk, costs, ask_status], **quick)
        look.click(
            look_inside,
            [chosen_one, look_k, texts],
            [inside, look_status],
            js=_checked("#f2b-look-pick", 0, 3),
            **shared,
        )
        add_endpoints(service, concurrency)
        page.load(None, js=PASTE)

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
