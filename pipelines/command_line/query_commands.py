"""Commands that find pictures in a store and answer questions about them."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .models import ModelOptions, load, open_store
from .options import (
    Candidates,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Rerank,
    Revision,
    Show,
    Store,
    TopK,
    TrustRemoteCode,
    Where,
    is_url,
)
from .printing import print_json, print_table, printable, say, short
from .showing import check_show_path, try_page

if TYPE_CHECKING:
    from fwd2bot.pipelines.store import SummaryStore

ANSWERS_AT_ONCE = 8


def search(
    store: Store,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What the pictures show.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="A picture (file or URL) instead of a text.")
    ] = None,
    top_k: TopK = 5,
    where: Where = None,
    rerank: Rerank = None,
    candidates: Candidates = 50,
    show: Show = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pictures that fit a text, or that are like a picture.

    \b
    fwd2bot search photos.store "a dog on a green field"
    fwd2bot search photos.store --image dog.jpg --top-k 20 --show hits.html
    fwd2bot search photos.store "a red car" --where "year > 2020" --json | jq -r '.hits[].source'
    """
    if (text is None) == (image is None):
        raise typer.BadParameter("Give a TEXT or --image FILE, one of the two.", param_hint="TEXT")
    _check_text(text, "TEXT")
    check_show_path(show)
    query = text if image is None else image if is_url(image) else Path(image)
    if isinstance(query, Path) and not query.is_file():
        raise FileNotFoundError(f"{image!r} does not exist or is no file.")
    options = ModelOptions(model, revision, trust_remote_code, device, dtype)
    opened, _, _ = _open(store, options, "text" if image is None else "compress")
    hits = opened.search(
        {"image": query} if image is not None and is_url(image) else query,
        top_k,
        where=where,
        rerank=rerank,
        candidates=candidates,
    )
    shown, problem = try_page(show, text or image, [(None, hits)])
    if as_json:
        print_json({"store": store, "query": text, "image": image, "hits": hits, "shown": shown})
    elif hits:
        _print_hits(hits)
    else:
        say("No picture was found: the store is empty, or --where leaves none.")
    if problem:
        raise problem


def ask(
    store: Store,
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="Ask about this picture; may be repeated.")
    ] = None,
    find: Annotated[
        str | None,
        typer.Option("--search", metavar="TEXT", help="What the picture shows. Default: find it by the question."),
    ] = None,
    top_k: TopK = 1,
    where: Where = None,
    rerank: Rerank = None,
    candidates: Candidates = 50,
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="One answer from all pictures at once; the model must have been trained for it."
        ),
    ] = False,
    fallback: Annotated[
        Literal["image"] | None,
        typer.Option(help="image: let the bare backbone read the original pictures, for texts in them; slower."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 256,
    show: Show = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a question from summaries alone.

    It is about the pictures of the store that fit best, or those of --id; each has an answer of its own, unless
    --together asks about all of them at once. No picture is opened, unless --fallback image asks for the originals.

    \b
    fwd2bot ask photos.store "What colour is the car?" --search "a car in the snow"
    fwd2bot ask photos.store "How many dogs are there?" --id 0c5ab3d1 --id 77aa0912
    fwd2bot ask photos.store "Is there a cat?" --top-k 3 --json
    fwd2bot ask photos.store "Which pictures show a cat?" --search "a cat" --top-k 3 --together
    fwd2bot ask photos.store "What does the sign say?" --search "a street sign" --fallback image
    """
    if ids and (find is not None or where is not None or rerank is not None):
        raise typer.BadParameter("It names the pictures; leave out --search, --where and --rerank.", param_hint="--id")
    _check_text(question, "QUESTION")
    _check_text(find, "--search")
    check_show_path(show)
    options = ModelOptions(model, revision, trust_remote_code, device, dtype)
    stage = None if fallback else "generate" if ids else "text"  # the originals need the whole model
    opened, *loaded = _open(store, options, stage, ids)
    begin, scores = time.perf_counter(), {}
    if not ids:
        query = question if find is None else find
        hits = opened.search(query, top_k, where=where, rerank=rerank, candidates=candidates)
        scores = {hit["id"]: hit["score"] for hit in hits}
    groups = [[one] for one in ids or scores]
    if not groups:
        raise ValueError("There is no picture to ask about: the store is empty, or --where leaves none.")
    if together:
        groups = [[one for group in groups for one in group]]
    share = (time.perf_counter() - begin) / len(groups)
    answers = _answers(opened, question, groups, fallback, max_new_tokens, *loaded)
    for one in answers:
        one["seconds"]["retrieve"] += share
        for picture in one["pictures"]:
            picture["score"] = scores.get(picture["id"])
    shown, problem = try_page(show, question, [(one["answer"], one["pictures"]) for one in answers])
    if as_json:
        print_json({"store": store, "question": question, "answers": answers, "shown": shown})
    elif len(answers) == 1:
        [answer] = answers
        print(printable(answer["answer"]))
        for picture in answer["pictures"]:
            number = f"{picture['number']}: " if len(answer["pictures"]) > 1 else ""
            say(f"from {number}{picture['source'] or picture['id']}")
    else:
        rows = [
            (one["answer"], _score(hit), hit["id"], hit["source"] or "") for one in answers for hit in one["pictures"]
        ]
        print_table(["answer", "score", "id", "source"], rows)
    if problem:
        raise problem


def _check_text(text: str | None, hint: str) -> None:
    if text is not None and not text.strip():
        raise typer.BadParameter("is empty. Give at least one word.", param_hint=hint)


def _open(
    path: str, options: ModelOptions, stage: str | None, ids: list[str] | None = None
) -> tuple["SummaryStore", Any, Any]:
    """A store, its model and processor; what is wrong with store or ids is told before a model is loaded."""
    opened = open_store(path)
    if ids:
        opened.get(ids)
    model, processor = load(options.or_of_store(opened.config), stage)
    return open_store(path, model, processor), model, processor


def _answers(
    store: "SummaryStore",
    question: str,
    groups: list[list[str]],
    fallback: str | None,
    max_new_tokens: int,
    model: Any,
    processor: Any,
) -> list[dict[str, Any]]:
    """What `fwd2bot-rag` says about each group of ids."""
    from transformers import pipeline

    pipe = pipeline("fwd2bot-rag", model=model, processor=processor, device=model.device, store=store)
    rows = [{"question": question, "ids": ids} for ids in groups]
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}  # the same command gives the same answer
    if fallback:
        settings["fallback"] = fallback
    return pipe(rows, batch_size=ANSWERS_AT_ONCE, progress=False, **settings)


def _print_hits(hits: list[dict[str, Any]]) -> None:
    names = list(hits[0]["metadata"])
    rows = [
        (
            _score(hit),
            hit["id"],
            hit["source"] or "",
            *("" if hit["metadata"][name] is None else short(hit["metadata"][name]) for name in names),
        )
        for hit in hits
    ]
    print_table(["score", "id", "source", *names], rows)


def _score(hit: dict[str, Any]) -> str:
    return "" if hit["score"] is None else f"{hit['score']:.3f}"
