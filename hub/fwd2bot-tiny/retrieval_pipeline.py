"""`fwd2bot-retrieval`: pictures by a sentence, sentences by a picture, from one embedding space."""

import importlib
import os
from collections.abc import Mapping, Sized
from functools import partial
from typing import Any

import torch

from .pipeline_batches import (
    BatchedPipeline,
    check_summary,
    checked_picture,
    count_summaries,
    each_input,
    is_picture,
    is_summary,
    is_url,
    refuse_unknown,
)
from .pipeline_memory import CandidateMemory, picture_key

PARAMETERS = (
    "images", "summary", "texts", "top_k", "where", "num_summary_tokens", "batch_size", "num_workers", "progress"
)  # fmt: skip
INTERNAL = ("candidates", "in_store")  # what `__call__` gives to `postprocess`
MEMORY_SIZE = 100_000  # embeddings


class RetrievalPipeline(BatchedPipeline):
    """Search pictures, their summaries or texts by sentences or by pictures.

    ```python
    pipe = pipeline("fwd2bot-retrieval")
    pipe("a dog on a green field", images=["a.jpg", "b.jpg"], top_k=1)     # [{"score": 0.71, "index": 1}]
    pipe(["a dog", "a cat"], summary=summary)                              # a list of such lists
    pipe(Path("a.jpg"), texts=["a dog", "a cat"])
    pipeline("fwd2bot-retrieval", store="pictures.store")("a dog", where="year > 2020")   # [{"id": …, "score": …, …}]
    ```

    Args:
        memory_size: number of candidates whose embeddings are remembered between calls.
        store: a `SummaryStore` that this model made, or its path; it is searched in place of candidates. Sentences
            need a model of `stage="text"` or a whole one.

    Raises:
        FileNotFoundError, ValueError: for a path without a store, or a store of another model.
        ImportError: for a store without the package fwd2bot and its extra `store`.
    """

    def __init__(self, *args: Any, memory_size: int = MEMORY_SIZE, store: Any = None, **kwargs: Any):
        self._memory = CandidateMemory(memory_size)
        refuse_unknown({name: kwargs[name] for name in INTERNAL if name in kwargs}, self, PARAMETERS)
        super().__init__(*args, **kwargs)
        self.store = None if store is None else open_store(store, self.model, self.processor)

    def __call__(
        self, queries: Any, *, images: Any = None, summary: Any = None, texts: Any = None, **kwargs: Any
    ) -> Any:
        """Rank candidates by the cosine of their embeddings with that of each query.

        Args:
            queries: a sentence (`str`); or a picture: a `pathlib.Path`, bytes, a `PIL.Image`, a uint8 array, or
                `{"image": …}` with any picture, a URL too; or a summary of one picture. Or a list, or a data set or an
                iterator of these. A `str` is always a sentence.
            images, summary, texts: the candidates, exactly one of the three: pictures as `fwd2bot-compress` takes
                them, a `Fwd2BotSummary` (or a `(N, k, d)` tensor), or sentences. None of them where the pipeline has
                a store.
            top_k: how many are returned, 5 by default; None for all.
            where: an SQL filter on the columns of the store, see `SummaryStore.search`.
            num_summary_tokens: length k at which query and candidates are embedded. Default: that of the given
                summaries, otherwise the largest that the model has.
            batch_size, num_workers, progress: see [`BatchedPipeline`].

        Candidates are embedded once, and remembered by their content: a file by its path, size and times, bytes and
        pixels by their hash, a URL by its address, the last summary by its tensors; for as long as the model's weights
        stay as they are. Pictures are held in memory while they are embedded; for more than fit, compress them with
        `fwd2bot-compress` and give `summary`.

        Returns:
            For one query `[{"score": float, "index": int}, …]`, best first, equal scores in the candidates' order.
            From a store, which has no order, "id", "source", "page" and "metadata" stand in place of "index".
            For a list of queries a list of such lists; for a data set or an iterator an iterator of them.

        Raises:
            TypeError, ValueError, FileNotFoundError: before any compute for an empty list, a wrong type, a path that
                is not there, a summary of the wrong dtype or shape, `top_k` below 1, or when not exactly one of the
                three is given.
        """
        refuse_unknown({name: kwargs[name] for name in INTERNAL if name in kwargs}, self, PARAMETERS)
        given = {"images": images, "summary": summary, "texts": texts}
        given = {name: value for name, value in given.items() if value is not None}
        if self.store is not None:
            return self._search_store(queries, given, kwargs)
        if {**self._postprocess_params, **kwargs}.get("where") is not None:
            raise ValueError("where filters the rows of a store. Make the pipeline with store=…, or leave it out.")
        if len(given) != 1:
            raise ValueError(
                "Give exactly one of images, summary and texts as the candidates, got "
                f"{' and '.join(given) or 'none'}."
            )
        running = {name: kwargs.pop(name) for name in ("batch_size", "num_workers", "progress") if name in kwargs}
        _, forward_params, _ = self._sanitize_parameters(**kwargs)
        length = {**self._forward_params, **forward_params}.get("num_summary_tokens")
        queries = self._queries(queries)

        if summary is not None:
            check_summary(summary, self.summary_width)
            kwargs["num_summary_tokens"] = self._length(length, queries, summary)
            candidates = self._embed_summary(summary, kwargs["num_summary_tokens"])
        else:
            kwargs["num_summary_tokens"] = self._length(length, queries)
            name, values = given.popitem()
            candidates = self._embed_items(name, values, kwargs["num_summary_tokens"], running)
        return super().__call__(queries, candidates=candidates, **kwargs, **running)

    def _search_store(self, queries: Any, given: dict, kwargs: dict) -> Any:
        """The store's rows for each query; embeddings of several queries are made in batches."""
        if given:
            raise ValueError(f"The pipeline searches {self.store!r}. Leave out {' and '.join(given)}.")
        length = self.store.config.num_summary_tokens
        asked = kwargs.pop("num_summary_tokens", self._forward_params.get("num_summary_tokens"))
        if asked not in (None, length):
            raise ValueError(
                f"The summaries of {self.store!r} have {length} tokens, not {asked!r} (num_summary_tokens)."
            )
        return super().__call__(self._queries(queries), num_summary_tokens=length, in_store=True, **kwargs)

    def _queries(self, queries: Any) -> Any:
        to_query = partial(query_item, summary_width=self.summary_width)
        return to_query(queries) if _is_one(queries) else each_input(queries, to_query, "query")

    def forget(self) -> None:
        """Forget the candidates of earlier calls."""
        self._memory.forget()

    def _length(self, length: int | None, queries: Any, *summaries: Any) -> int:
        """The length k of this call: as asked for, else that of all summaries given, else the model's largest."""
        if length is not None:
            return length
        queries = queries if isinstance(queries, list) else [queries] if isinstance(queries, dict) else []
        summaries = [*summaries, *(query["summary"] for query in queries if "summary" in query)]
        lengths = {length for summary in summaries for length in _lengths(summary)}
        if len(lengths) > 1:
            raise ValueError(
                f"The summaries have the lengths {sorted(lengths)}, and embeddings compare at equal length only. Give "
                f"num_summary_tokens, at most {min(lengths)}."
            )
        return lengths.pop() if lengths else self.model.config.num_summary_tokens

    def _embed_items(self, name: str, values: Any, length: int, running: dict) -> torch.Tensor:
        """`(N, d)` embeddings of `images` or `texts`, from memory as far as they are in it."""
        kind, what = ("image", "picture") if name == "images" else ("text", "text")
        if is_picture(values) or isinstance(values, str):
            values = [values]
        values = each_input(values, partial(_item, kind), what, (kind,))
        total = len(values) if isinstance(values, Sized) else None
        setting, keys, items = self._setting(length), [], []
        for index, item in enumerate(self._with_bar(values, total, running.get("progress"), f"reading {name}")):
            key = ("text", item.get("text"))
            if "image" in item:
                try:
                    key, item["image"] = picture_key(item["image"], self.processor.load_image)
                except (ValueError, OSError) as error:
                    raise ValueError(f"Picture {index}: {error}") from error
            keys.append((setting, key))
            items.append({**item, "name": f"{what.capitalize()} {index}"})
        if not items:
            raise ValueError(f"No {what} was given as a candidate: {name} is empty.")

        def embed(new: list[dict]) -> list[torch.Tensor]:
            return super(RetrievalPipeline, self).__call__(new, num_summary_tokens=length, **running)

        return self._memory.candidates(keys, items, embed)

    def _embed_summary(self, summary: Any, length: int) -> torch.Tensor:
        return self._memory.summaries(
            summary,
            self._setting(length),
            lambda: self.model.embed(summary=summary, num_summary_tokens=length).cpu(),
        )

    def _setting(self, length: int) -> tuple[Any, ...]:
        """What an embedding depends on beside its input."""
        prompts = (self.processor.image_prompt, self.processor.text_prompt)
        return length, self.dtype, self.model.fingerprint, prompts

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        forward = {name: parameters.pop(name) for name in ("num_summary_tokens",) if name in parameters}
        ranking = ("top_k", "where", *INTERNAL)
        ranking = {name: parameters.pop(name) for name in ranking if name in parameters}
        refuse_unknown(parameters, self, PARAMETERS)
        top_k = ranking.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None for all candidates, got {top_k!r}.")
        return {}, forward, ranking

    def input_name(self, index: int, value: Any) -> str:
        return value.get("name", f"Query {index}")

    def preprocess(self, item: dict) -> dict:
        return {"image": self.processor.load_image(item["image"])} if "image" in item else item

    def _forward(self, items: list[dict], num_summary_tokens: int | None = None) -> list[torch.Tensor]:
        """The embedding `(d,)` of each item; texts, pictures and summaries may be mixed."""
        embeddings: list[torch.Tensor | None] = [None] * len(items)
        for kind, embed in (("text", self._texts), ("image", self._pictures), ("summary", self._summaries)):
            places = [index for index, item in enumerate(items) if kind in item]
            if places:
                found = embed([items[index][kind] for index in places], num_summary_tokens).cpu()
                for place, embedding in zip(places, found, strict=True):
                    embeddings[place] = embedding
        return embeddings

    def _texts(self, texts: list[str], length: int | None) -> torch.Tensor:
        return self.model.embed(**self.processor.process_texts(texts).to(self.device), num_summary_tokens=length)

    def _pictures(self, pictures: list[Any], length: int | None) -> torch.Tensor:
        return self.model.embed(summary=self.compress_pictures(pictures, length), num_summary_tokens=length)

    def _summaries(self, summaries: list[Any], length: int | None) -> torch.Tensor:
        return torch.cat([self.model.embed(summary=summary, num_summary_tokens=length) for summary in summaries])

    def postprocess(
        self,
        embedding: torch.Tensor,
        candidates: torch.Tensor | None = None,
        top_k: int | None = 5,
        where: str | None = None,
        in_store: bool = False,
    ) -> torch.Tensor | list[dict[str, Any]]:
        """The embedding itself `(d,)`, or the ranking of `candidates` `(N, d)` or of the rows of the store."""
        if in_store:
            if top_k is None:  # of all rows an index finds some
                return self.store.search(embedding, max(len(self.store), 1), where=where, approximate=False)
            return self.store.search(embedding, top_k, where=where)
        if candidates is None:
            return embedding
        scores, order = (candidates @ embedding).sort(descending=True, stable=True)  # (N,)
        ranking = zip(scores[:top_k].tolist(), order[:top_k].tolist(), strict=True)
        return [{"score": score, "index": index} for score, index in ranking]


def open_store(store: Any, model: Any, processor: Any) -> Any:
    """The `SummaryStore` at a path, or one that is open, with the model that made it.

    Raises:
        TypeError, FileNotFoundError, ValueError: for what is no store, or one of another model.
        ImportError: without the package fwd2bot and its extra `store`.
    """
    path = getattr(store, "path", store)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"store must be a SummaryStore or the path of one, got {type(store).__name__}.")
    try:
        # By its name: transformers takes an import statement, wherever it stands in a file on the Hub, for a package
        # without which the file cannot be used.
        module = importlib.import_module("fwd2bot.pipelines.store")
    except ImportError as error:
        raise ImportError(f'A store needs `pip install "fwd2bot[store]"`: {error}.') from error
    return module.SummaryStore.open(path, model, processor)


def _is_one(queries: Any) -> bool:
    return is_picture(queries) or is_summary(queries) or isinstance(queries, Mapping)


def query_item(value: Any, summary_width: int) -> dict[str, Any]:
    """A query as an item of the pipeline: `{"text": …}`, `{"image": …}` or `{"summary": …}`, that on the CPU."""
    if isinstance(value, Mapping):
        kinds = [kind for kind in ("text", "image") if kind in value]
        if len(kinds) != 1:
            raise ValueError(
                f"A query dict must have either 'text' or 'image', got the keys {sorted(map(str, value))}."
            )
        return _item(kinds[0], value)
    if is_summary(value):
        check_summary(value, summary_width)
        count = count_summaries(value)
        if count != 1:
            raise ValueError(
                f"A summary as a query must be that of one picture, got {count}. For several queries give "
                "list(summary)."
            )
        return {"summary": value.to("cpu")}  # a worker process cannot hand on what is on an accelerator
    if isinstance(value, str) and (is_url(value) or (os.path.splitext(value)[1] and os.path.isfile(value))):
        raise ValueError(
            f"The query {value!r} is the address of a picture, but a str is searched for as a sentence. Give "
            "{'image': …} with it to search with the picture, or {'text': …} to search for these words."
        )
    if not is_picture(value):
        raise TypeError(
            "A query must be a sentence (str), a picture (pathlib.Path, bytes, PIL.Image or uint8 array), a summary "
            f"of one picture, or a dict of 'text' or 'image', got {type(value).__name__}."
        )
    return _item("text" if isinstance(value, str) else "image", value)


def _item(kind: str, value: Any) -> dict[str, Any]:
    if kind == "image":
        return {"image": checked_picture(value)}
    text = value["text"] if isinstance(value, Mapping) and "text" in value else value
    if not isinstance(text, str):
        raise TypeError(f"A text must be a str, got {type(text).__name__}.")
    if not text.strip():
        raise ValueError("The text is empty. Give at least one word.")
    return {"text": text}


def _lengths(summary: Any) -> set[int]:
    if hasattr(summary, "lengths"):
        return set(summary.lengths.tolist())
    return {summary.shape[1]}
