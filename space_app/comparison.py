"""One question, answered from summaries and by the bare backbone on all image tokens, with what each costs."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from fwd2bot.pipelines.rag_context import backbone_inputs

from .uploads import VisitorError

MAX_NEW_TOKENS = 48
POLL_SECONDS = 0.1  # after which an answer notices that it is no longer wanted, also before the next token
STEP_SECONDS = 120  # that a single token may take before the answer is given up
STORED = torch.float16  # in which the bytes of image tokens and summaries are counted


@dataclass(frozen=True)
class Answer:
    """What is known of an answer while it is made and at its end.

    Args:
        text: what was said so far.
        image_tokens: tokens that stand for the pictures. prompt_tokens: all that the model reads, with these.
        image_bytes: of the vectors of these image tokens, two a number.
        first_token_seconds: from the call to the first new token; None before it.
        cache_bytes: of keys and values for the prompt; None before the end.
        done: whether the answer is complete. cut: whether it ends at `MAX_NEW_TOKENS`, not where the model ended it.
    """

    text: str = ""
    image_tokens: int = 0
    prompt_tokens: int = 0
    image_bytes: int = 0
    first_token_seconds: float | None = None
    cache_bytes: int | None = None
    done: bool = False
    cut: bool = False


def answer_from_summaries(
    model: Any, processor: Any, prompt: str, summary: Any, stop: threading.Event, places: threading.Semaphore
) -> Iterator[Answer]:
    """Stream the answer to a prompt with a placeholder for each summary; when `stop` is set, it ends before its end.

    Args:
        places: at the model; one is held until the model is done, also with the step of an answer that was stopped.

    Raises:
        ValueError: when prompt and answer are longer than the model reads, before any compute; when a token takes
            longer than `STEP_SECONDS`.
    """
    inputs = processor(text=[prompt], verbose=False).to(model.device)
    tokens = int(summary.lengths.sum())
    length = inputs["input_ids"].shape[1] - len(summary) + tokens
    start = Answer(image_tokens=tokens, prompt_tokens=length, image_bytes=tokens * _width(model) * STORED.itemsize)
    check_length(model, length)

    def generate(**kwargs: Any) -> Any:
        return model.generate_from_summary(summary, **inputs, **kwargs)

    yield from _stream(model, processor, start, generate, length, stop, places)


def answer_uncompressed(
    model: Any, processor: Any, prompt: str, images: list[Any], stop: threading.Event, places: threading.Semaphore
) -> Iterator[Answer]:
    """Stream the bare backbone's answer to the same prompt, with the pictures in full.

    The time to the first token has the vision tower in it, as it is run for every question. The rest is as in
    `answer_from_summaries`.
    """
    inputs = backbone_inputs(processor, prompt, images).to(model.device, model.dtype)
    tokens = int((inputs["input_ids"] == model.image_token_id).sum())
    length = inputs["input_ids"].shape[1]
    start = Answer(image_tokens=tokens, prompt_tokens=length, image_bytes=tokens * _width(model) * STORED.itemsize)
    check_length(model, length)

    def generate(**kwargs: Any) -> Any:
        return model.generate_uncompressed(**inputs, **kwargs)

    yield from _stream(model, processor, start, generate, length, stop, places)


def check_length(model: Any, length: int) -> None:
    """Raise `ValueError` unless a prompt of `length` tokens and its answer fit into what the model reads."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + MAX_NEW_TOKENS > limit:
        raise ValueError(
            f"The prompt has {length} tokens and the answer may have {MAX_NEW_TOKENS}; the model reads {limit}."
        )


def _width(model: Any) -> int:
    return model.summary_projector.out_features


class _TimedStreamer(TextIteratorStreamer):
    """Hands on text as it comes until `stop` is set, and remembers when the first new token came."""

    def __init__(self, tokenizer: Any, stop: threading.Event):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.begin, self.stop = time.perf_counter(), stop
        self.first: float | None = None
        self.new: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.perf_counter() - self.begin
            self.new += value.flatten().tolist()
        super().put(value)

    def __next__(self) -> str:
        since = time.perf_counter()
        while not self.stop.is_set():
            try:
                text = self.text_queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                # From where the model began: what it may have waited for is the step of an answer that was stopped.
                if time.perf_counter() > max(since, self.begin) + STEP_SECONDS:
                    raise VisitorError(
                        f"No word came within {STEP_SECONDS} seconds, so the answer was given up. Ask again later, or "
                        "about fewer pictures."
                    ) from None
                continue
            if text == self.stop_signal:
                break
            return text
        raise StopIteration


def _stream(
    model: Any,
    processor: Any,
    answer: Answer,
    generate: Callable[..., Any],
    length: int,
    stop: threading.Event,
    places: threading.Semaphore,
) -> Iterator[Answer]:
    """Run `generate` in a thread of its own and follow it; a consumer that stops listening stops it."""
    streamer, left, result = _TimedStreamer(processor.tokenizer, stop), threading.Event(), {}

    def stopped(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), left.is_set() or stop.is_set(), device=ids.device)

    def run() -> None:
        try:
            with places:  # which one that was stopped may hold for the rest of its step
                if left.is_set() or stop.is_set():
                    return
                streamer.begin = time.perf_counter()
                result["output"] = generate(
                    streamer=streamer,
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    return_dict_in_generate=True,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )
        except BaseException as error:  # told by the thread that listens
            result["error"] = error
            streamer.end()

    thread = threading.Thread(target=run, daemon=True, name="answer")
    thread.start()
    try:
        for text in streamer:
            answer = replace(answer, text=answer.text + text, first_token_seconds=streamer.first)
            yield answer
        if stop.is_set():  # the thread ends with the step that it is at, and frees its place then
            return
        thread.join()
    finally:
        left.set()
    if "error" in result:
        raise result["error"]
    output, ends = result["output"], model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    yield replace(
        answer,
        text=answer.text.strip(),
        first_token_seconds=streamer.first,
        cache_bytes=cache_bytes(output.past_key_values, length),
        done=True,
        cut=len(streamer.new) >= MAX_NEW_TOKENS and streamer.new[-1] not in ends,
    )


def cache_bytes(cache: Any, prompt_length: int) -> int | None:
    """Bytes of the keys and values of the first `prompt_length` positions; None for a cache of another kind."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for values in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(values, torch.Tensor) or values.ndim != 4:  # (N, heads, positions, d)
                return None
            total += values[:, :, :prompt_length].numel() * values.element_size()
    return total or None
