"""What programs call (`gradio_client`, the API page): compress, search, ask. Errors are raised there, not shown."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from .checks import check_ids
from .comparison import Answer
from .inputs import sent
from .service import Service
from .uploads import VisitorError, arrived
from .waiting import asked_at, in_turn

logger = logging.getLogger(__name__)


def add_endpoints(page: gr.Blocks, service: Service, shared: dict[str, Any]) -> None:
    """Add the endpoints to the page that is being built; `shared` are options of all events that need the model."""

    def compress(picture: str, num_summary_tokens: int, request: gr.Request) -> dict[str, Any]:
        with arrived(picture) as uploads:  # whose file goes at the end, whatever comes
            length = _length(service, num_summary_tokens)
            added = service.add(request.session_hash, uploads)
        if added.problems:
            raise VisitorError(added.problems[0])
        [made] = added.pictures or [picture for _, picture in added.again]
        summary = made.summary.truncate(length)
        return {
            "id": made.id,
            "num_summary_tokens": summary.num_summary_tokens,
            "summary": summary.tokens[0].tolist(),
            "summary_bytes": 2 * summary.tokens[0].numel(),
        }

    def search(query: str, num_summary_tokens: int, top_k: int, request: gr.Request) -> list[dict[str, Any]]:
        found = service.search(
            request.session_hash, query, _length(service, num_summary_tokens), whole("top_k", top_k), keep=False
        )
        return [{"id": hit.picture.id, "title": hit.picture.title, "score": hit.score} for hit in found]

    @in_turn(lambda inputs, earlier: inputs[5] is not True)  # unless it begins a conversation
    def ask(
        question: str,
        pictures: list[str],
        find: int,
        num_summary_tokens: int,
        uncompressed: bool,
        fresh: bool,
        request: gr.Request,
    ) -> dict[str, Any]:
        uncompressed, fresh = switched("uncompressed", uncompressed), switched("fresh", fresh)
        pictures, find = check_ids([] if pictures is None else pictures), whole("find", find)
        if not pictures and not find:
            raise VisitorError("No picture is chosen. Give ids in pictures, or in find how many shall be found.")
        if pictures and find > 0:
            raise VisitorError(
                f"pictures has {len(pictures)} and find is {find}: only one of the two goes. Give pictures=[] or "
                "find=0."
            )
        exchange = None
        for exchange in service.ask(  # noqa: B007  (the last one counts)
            request.session_hash,
            question,
            pictures,
            _length(service, num_summary_tokens),
            find=find,
            uncompressed=uncompressed,
            fresh=fresh,
            asked_at=asked_at(page),
        ):
            pass
        other = exchange.uncompressed
        return {
            "pictures": [picture.id for picture in exchange.pictures],
            **_said(exchange.summary),
            "uncompressed": None if other is None else _said(other),
            "note": exchange.note,
        }

    # Numbers as they come: Gradio would fail on a word before this page can say what is wrong.
    k = gr.Number(value=0, label="num_summary_tokens", visible=False)
    one = sent(gr.File(label="picture", visible=False))
    # In the examples of the API page, which shows the url as `handle_file(…)`; Gradio's own is one of a PDF elsewhere.
    one.example_payload = lambda: {"path": "photo.jpg", "url": "photo.jpg", "meta": {"_type": "gradio.FileData"}}
    words = gr.Textbox(label="text", visible=False)
    number = gr.Number(value=5, label="count", visible=False)
    finding = gr.Number(value=0, label="find", visible=False)
    ids = gr.JSON(value=[], label="pictures", visible=False)
    switch = gr.Checkbox(value=False, label="uncompressed", visible=False)
    anew = gr.Checkbox(value=False, label="fresh", visible=False)
    made, hits, answered = (gr.JSON(label=name, visible=False) for name in ("summary", "hits", "answer"))
    gr.Button("compress", visible=False).click(
        _raised(compress),
        [one, k],
        made,
        api_name="compress",
        api_description="Compress a picture to num_summary_tokens vectors (0: the Space's largest number). It can be "
        "searched for and asked about under its id until the client closes. Returns id, num_summary_tokens, summary "
        "(a list of vectors) and summary_bytes (at two bytes a number).",
        **shared,
    )
    gr.Button("search", visible=False).click(
        _raised(search),
        [words, k, number],
        hits,
        api_name="search",
        api_description="Find the pictures that fit a sentence, among those of the Space and those that this client "
        "has compressed. Returns a list of id, title and score (cosine), best first; top_k of them, 1 to 50.",
        preprocess=False,
        **shared,
    )
    gr.Button("ask", visible=False).click(
        _raised(ask),
        [words, ids, finding, k, switch, anew],
        answered,
        api_name="ask",
        api_description="Answer a question from the summaries of pictures: those with the ids in the list pictures (1 "
        "to 5; find must be 0 then), or, where it is empty, as many as find says (1 to 5), found by the question "
        "itself. A question about the same pictures goes on with the conversation, and so does one with the same "
        "find: it is about the pictures that were found before, while another find searches anew. With fresh a new "
        "conversation begins, and nothing said before counts. With uncompressed also the answer without compression. "
        "Returns pictures (ids), answer, cut_off (whether it ends because it may not be longer), cost, uncompressed "
        "(answer, cut_off, cost) and note.",
        preprocess=False,
        **shared,
    )


def _length(service: Service, number: Any) -> int:
    """The length k, of which 0 or none is the largest."""
    number = whole("num_summary_tokens", 0 if number is None else number)
    if not 0 <= number <= service.max_length:
        raise VisitorError(f"num_summary_tokens must be 0 (the largest) or 1 to {service.max_length}, not {number}.")
    return number or service.max_length


def whole(name: str, number: Any) -> int:
    """A whole number, which JSON may bring as 8.0; its range is the service's to check."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number % 1 or abs(number) > 2**53:
        raise VisitorError(f"{name} must be a whole number, not {number!r}.")
    return int(number)


def switched(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise VisitorError(f"{name} must be true or false, not {value!r}.")
    return value


def _said(answer: Answer) -> dict[str, Any]:
    cost = {
        "image_tokens": answer.image_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "image_bytes": answer.image_bytes,
        "first_token_seconds": answer.first_token_seconds,
        "cache_bytes": answer.cache_bytes,
    }
    return {"answer": answer.text, "cut_off": answer.cut, "cost": cost}


def _raised(function: Callable) -> Callable:
    """Errors as programs get them: what they can mend in words, of the rest no more than that it happened."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except VisitorError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception:
            logger.exception("An endpoint failed.")
            raise gr.Error("Something went wrong on the server, which has noted it.", print_exception=False) from None

    return run
