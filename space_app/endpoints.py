"""What programs call (`gradio_client`, the API page): compress, search, ask. Errors are raised there, not shown."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from .comparison import Answer
from .service import Service
from .uploads import VisitorError, read_and_delete

logger = logging.getLogger(__name__)


def add_endpoints(service: Service, concurrency: int) -> None:
    """Add the endpoints to the page that is being built."""
    shared = {"concurrency_id": "model", "concurrency_limit": concurrency}

    def compress(picture: str, num_summary_tokens: int, request: gr.Request) -> dict[str, Any]:
        added, problems = service.add(request.session_hash, read_and_delete(picture))
        if problems:
            raise VisitorError(problems[0])
        [made] = added
        summary = made.summary.truncate(_length(service, num_summary_tokens))
        return {
            "id": made.id,
            "num_summary_tokens": summary.num_summary_tokens,
            "summary": summary.tokens[0].tolist(),
            "summary_bytes": 2 * summary.tokens[0].numel(),
        }

    def search(query: str, num_summary_tokens: int, top_k: int, request: gr.Request) -> list[dict[str, Any]]:
        found = service.search(request.session_hash, query, _length(service, num_summary_tokens), int(top_k))
        return [{"id": hit.picture.id, "title": hit.picture.title, "score": hit.score} for hit in found]

    def ask(
        question: str, pictures: list[str], find: int, num_summary_tokens: int, uncompressed: bool, request: gr.Request
    ) -> dict[str, Any]:
        exchange = None
        for exchange in service.ask(  # noqa: B007  (the last one counts)
            request.session_hash,
            question,
            list(pictures or []),
            _length(service, num_summary_tokens),
            find=int(find),
            uncompressed=uncompressed,
        ):
            pass
        other = exchange.uncompressed
        return {
            "pictures": [picture.id for picture in exchange.pictures],
            "answer": exchange.summary.text,
            "cost": _cost(exchange.summary),
            "uncompressed": None if other is None else {"answer": other.text, "cost": _cost(other)},
            "note": exchange.note,
        }

    k = gr.Number(value=0, precision=0, label="num_summary_tokens", visible=False)
    one = gr.File(label="picture", visible=False)
    words = gr.Textbox(label="text", visible=False)
    number = gr.Number(value=5, precision=0, label="count", visible=False)
    finding = gr.Number(value=1, precision=0, label="find", visible=False)
    ids = gr.JSON(value=[], label="pictures", visible=False)
    switch = gr.Checkbox(value=False, label="uncompressed", visible=False)
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
        **shared,
    )
    gr.Button("ask", visible=False).click(
        _raised(ask),
        [words, ids, finding, k, switch],
        answered,
        api_name="ask",
        api_description="Answer a question from the summaries of pictures: those with the ids in the list pictures (1 "
        "to 5), or, where it is empty, as many as find says, found by the question itself. A question about the same "
        "pictures goes on with the conversation. With uncompressed also the answer without compression. Returns "
        "pictures (ids), answer, cost, uncompressed (answer and cost) and note.",
        **shared,
    )


def _length(service: Service, number: int) -> int:
    return service.max_length if not number else int(number)


def _cost(answer: Answer) -> dict[str, Any]:
    return {
        "image_tokens": answer.image_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "image_bytes": answer.image_bytes,
        "first_token_seconds": answer.first_token_seconds,
        "cache_bytes": answer.cache_bytes,
    }


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
