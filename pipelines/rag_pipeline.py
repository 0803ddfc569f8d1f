"""`fwd2bot-rag`: a question about many pictures, answered from the summaries of the few that a store finds for it.

This file is part of the package only and not of the folders on the Hub: what it reads is a store, which needs the
package anyway.
"""

import time
from collections.abc import Mapping
from typing import Any

from .answer_inputs import is_one_question
from .answer_pipeline import RUN_PARAMETERS, AnswerPipeline
from .pipeline_batches import each_input
from .rag_chat import RagChat
from .rag_context import (
    backbone_inputs,
    check_room,
    named_pictures,
    numbered_prompt,
    question_text,
    read_originals,
)
from .retrieval_pipeline import open_store

COLUMNS = ("question", "text", "query", "ids")
TOP_K = 3


class RagPipeline(AnswerPipeline):
    """Find the pictures of a store that a question is about, and answer it from their summaries, all in one prompt.

    ```python
    pipe = pipeline("fwd2bot-rag", store="pictures.store", model_kwargs={"stage": "text"})
    pipe("Which of these pictures show a dog?", query="a dog", top_k=3, where="year > 2020")
    # {"answer": "1 and 3", "pictures": [{"number": 1, "id": …, "score": …, "source": …, …}, …], "used": [id, id],
    #  "seconds": {"retrieve": …, "read": …, "answer": …}}
    chat = pipe.chat("a dog")          # several questions about the same pictures
    ```

    No picture is opened and no vision tower is needed, unless `fallback="image"` asks for the originals.

    Args:
        store: a `SummaryStore` that this model made, or its path.

    Raises:
        FileNotFoundError, ValueError: without a store, or for one of another model.
        ImportError: without the extra `store`.
    """

    own_parameters = (
        "ids", "query", "top_k", "where", "fallback", "num_summary_tokens", "max_new_tokens", "generate_kwargs",
        "stop_sequence", "skip_special_tokens", "clean_up_tokenization_spaces",
    )  # fmt: skip
    _non_generation_params = ("top_k",)  # of `generate()` another thing, which is sampling

    def __init__(self, *args: Any, store: Any = None, **kwargs: Any):
        if store is None:
            raise ValueError(
                "fwd2bot-rag answers from a store: pipeline('fwd2bot-rag', store='pictures.store'). Make one with "
                "SummaryStore.create, or ask about pictures at hand with fwd2bot-answer."
            )
        super().__init__(*args, **kwargs)
        self.store = open_store(store, self.model, self.processor)

    def __call__(self, questions: Any, *, ids: Any = None, query: Any = None, **kwargs: Any) -> Any:
        """Answer one question, a list of questions, or a stream of rows.

        Args:
            questions: a `str`; or a chat, a list of messages with "role" and "content"; or a list of these. The
                pictures come first in the prompt, from the best on and numbered (see `rag_context.numbered_prompt`),
                unless the question marks their places. Or rows `{"question": …}` with a "query" or "ids" of their
                own: one, a list, a data set, an iterator.
            ids: the pictures that the questions are about, in this order; nothing is searched then.
            query: what is searched for: whatever `SummaryStore.search` takes. Default: the words of the question, of a
                chat those of its last message.
            top_k: how many pictures are retrieved, 3 by default. (That of sampling goes into `generate_kwargs`.)
            where: an SQL filter on the columns of the store, see `SummaryStore.search`.
            num_summary_tokens: how many tokens of each summary the prompt holds. Default: all that the store has.
            fallback: "image" to answer from the originals in place of their summaries, uncompressed, by the bare
                backbone; for text in pictures, where a summary loses most. Each must be where it was when the store
                was made, with the same content. Needs a model with its vision tower.
            max_new_tokens, do_sample, …: any argument of `generate()`, here or together in `generate_kwargs`.
            stop_sequence, skip_special_tokens, clean_up_tokenization_spaces: as in `fwd2bot-answer`.
            batch_size, num_workers, progress: see [`BatchedPipeline`].

        Returns:
            For one question a dict, for a list of questions a list, for a data set or an iterator an iterator.
            "answer"; "pictures", those in the prompt in their order, each with "number" (from 1), "id", "score" (None
            with `ids`), "source", "page" and "metadata"; "used", the ids of those that the answer names by number, or
            None if it names none: read from its words, see `rag_context.named_pictures`; "seconds" of each step, where
            a batch's answers count an equal share.

        Raises:
            TypeError, ValueError: for an empty question or list, an argument that there is none of, a filter that
                does not parse, ids that are not in the store, a store in which nothing fits, or more than the model
                can read.
            FileNotFoundError: for originals that cannot be reached, naming them.
        """
        running = {name: kwargs.pop(name) for name in RUN_PARAMETERS if name in kwargs}
        _, forward_params, _ = self._sanitize_parameters(**kwargs)
        shared = {"query": query, "ids": ids}
        if is_one_question(questions):
            inputs = self._item(questions, shared)
        else:
            self._check_streamer(forward_params, running)
            inputs = each_input(questions, lambda row: self._item(row, shared), "question", COLUMNS)
        return super(AnswerPipeline, self).__call__(inputs, **kwargs, **running)

    def chat(
        self,
        query: Any = None,
        *,
        ids: Any = None,
        top_k: int | None = None,
        where: str | None = None,
        num_summary_tokens: int | None = None,
    ) -> RagChat:
        """Several questions about the same pictures: those found for `query`, or those of `ids`.

        The summaries are read by the model once; see [`RagChat`].
        """
        given = {"top_k": top_k, "where": where, "num_summary_tokens": num_summary_tokens}
        _, given, _ = self._sanitize_parameters(**given)
        settings = {**self._forward_params, **given}
        if (query is None) == (ids is None):
            raise ValueError(f"Give query or ids, got {'neither' if ids is None else 'both'}.")
        begin = time.perf_counter()
        pictures = self._pictures(query, _id_list(ids), settings.get("top_k", TOP_K), settings.get("where"))
        found = time.perf_counter()
        summary = self._read(pictures, settings.get("num_summary_tokens"))
        seconds = {"retrieve": found - begin, "read": time.perf_counter() - found}
        return RagChat(self, pictures, summary, seconds)

    def _item(self, row: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """A question or a row with what it asks for, checked as far as that needs no search."""
        if not isinstance(row, Mapping):
            row = {"question": row}
        brought = sorted({"image", "images", "summary"} & set(row))
        if brought:
            raise ValueError(f"A row brings {', '.join(brought)} of its own, which fwd2bot-answer is asked about.")
        questions = [row[name] for name in ("question", "text") if row.get(name) is not None]
        if len(questions) != 1:
            raise ValueError(f"A row must have a 'question' (or 'text'), got the keys {sorted(map(str, row))}.")
        own = {name: shared[name] if row.get(name) is None else row[name] for name in shared}
        if own["query"] is not None and own["ids"] is not None:
            raise ValueError("Give query or ids, got both: nothing is searched for where ids name the pictures.")
        text = question_text(questions[0])
        query = text if own["query"] is None else own["query"]
        return {"question": questions[0], "text": text, "query": query, "ids": _id_list(own["ids"])}

    def _sanitize_parameters(
        self, top_k: int | None = None, where: str | None = None, fallback: str | None = None, **parameters: Any
    ) -> tuple[dict, dict, dict]:
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(
                f"top_k, the number of pictures, must be an integer of at least 1, got {top_k!r}. That of sampling "
                "goes into generate_kwargs."
            )
        if fallback not in (None, "image"):
            raise ValueError(f"fallback={fallback!r} is unknown; choose None or 'image'.")
        if fallback and self.model.stage is not None:
            raise ValueError(
                f"fallback='image' reads pictures, and the model was loaded with stage={self.model.stage!r}, without "
                "all parts of the backbone. Load it without `stage`."
            )
        for name in ("return_full_text", "return_tensors"):
            if name in parameters:
                raise TypeError(f"{type(self).__name__} has no argument {name!r}: it returns a dict per question.")
        before, forward, after = super()._sanitize_parameters(**parameters)
        own = {"top_k": top_k, "where": where, "fallback": fallback}
        return before, forward | {name: value for name, value in own.items() if value is not None}, after

    def _forward(
        self,
        items: list[dict[str, Any]],
        top_k: int = TOP_K,
        where: str | None = None,
        fallback: str | None = None,
        num_summary_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        settings = self._settings(generate_kwargs or {})
        asked = []
        for item in items:
            begin = time.perf_counter()
            pictures = self._pictures(item["query"], item["ids"], top_k, where)
            prompt = numbered_prompt(item["question"], len(pictures), self.processor)
            found = time.perf_counter()
            if fallback:
                ids = [picture["id"] for picture in pictures]
                content = {"images": read_originals(self.store, ids, self.processor.load_image)}
            else:
                content = {"summary": self._read(pictures, num_summary_tokens)}
            seconds = {"retrieve": found - begin, "read": time.perf_counter() - found}
            asked.append({**item, "prompt": prompt, "pictures": pictures, "seconds": seconds, **content})

        begin = time.perf_counter()
        if fallback:
            answers = [self._answer_uncompressed(one, generate_kwargs or {}) for one in asked]
        else:
            for one in asked:
                num_tokens = self.processor(text=[one["prompt"]], verbose=False)["input_ids"].shape[1]
                num_tokens += int(one["summary"].lengths.sum()) - len(one["pictures"])
                check_room(self.model, num_tokens, settings, f"{len(one['pictures'])} summaries")
            plain = [{name: one[name] for name in ("question", "prompt", "summary")} for one in asked]
            answers = [answer["ids"] for answer in super()._forward(plain, None, generate_kwargs)]
        share = (time.perf_counter() - begin) / len(asked)
        return [
            {name: one[name] for name in ("question", "text", "pictures")}
            | {"ids": ids, "seconds": {**one["seconds"], "answer": share}}
            for one, ids in zip(asked, answers, strict=True)
        ]

    def postprocess(self, output: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        [answer] = super().postprocess(output, **parameters)
        answer, pictures = answer["generated_text"], output["pictures"]
        question = output["text"]
        used = [pictures[number - 1]["id"] for number in named_pictures(question, answer, len(pictures))]
        return {"answer": answer, "pictures": pictures, "used": used or None, "seconds": output["seconds"]}

    def _settings(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The settings of `generate()` that hold; `ValueError` for several answers to one question."""
        settings = self._generation_settings(self._generate_arguments(generate_kwargs))
        if (settings.get("num_return_sequences") or 1) > 1:
            raise ValueError("fwd2bot-rag gives one answer to a question. Leave out num_return_sequences.")
        return settings

    def _pictures(self, query: Any, ids: list[str] | None, top_k: int, where: str | None) -> list[dict[str, Any]]:
        """The rows of `ids`, or those found, numbered in the order of the prompt."""
        if ids is None:
            rows = self.store.search(query, top_k, where=where)
            if not rows:
                reason = "is empty" if where is None else f"has no picture that fits the filter {where!r}"
                raise ValueError(f"The store {self.store.path} {reason}.")
        else:
            names = ("source", "page", "metadata")
            rows = [
                {"id": row["id"], "score": None} | {name: row[name] for name in names} for row in self.store.get(ids)
            ]
        return [{"number": number, **row} for number, row in enumerate(rows, 1)]

    def _read(self, pictures: list[dict[str, Any]], num_summary_tokens: int | None) -> Any:
        summary = self.store.summary([picture["id"] for picture in pictures])
        return summary if num_summary_tokens is None else summary.truncate(num_summary_tokens)

    def _answer_uncompressed(self, asked: dict[str, Any], generate_kwargs: dict[str, Any]) -> list[Any]:
        """The bare backbone's answer, as ids, from pictures with all their tokens."""
        generate_kwargs = self._generate_arguments(generate_kwargs, return_dict_in_generate=False)
        inputs = backbone_inputs(self.processor, asked["prompt"], asked["images"]).to(self.device, self.model.dtype)
        settings = self._generation_settings(generate_kwargs)
        check_room(self.model, inputs["input_ids"].shape[1], settings, f"{len(asked['images'])} pictures")
        output = self.model.generate_uncompressed(**inputs, **generate_kwargs)
        [ids] = self._new_ids(output, inputs["input_ids"], generate_kwargs)
        return ids


def _id_list(ids: Any) -> list[str] | None:
    return [ids] if isinstance(ids, str) else None if ids is None else list(ids)
