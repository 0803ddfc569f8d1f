"""The second process of the demo: searches and answers from a file of summaries, without pictures or vision tower.

Reads a request as JSON from standard input and prints its results as one line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

LENGTHS = (8, 2)
TOP_K = 4
MAX_NEW_TOKENS = 16
REPEATS = 5


def measure(generate: Callable[[int, int], str], count: int) -> dict[str, Any]:
    """Answers to `count` questions, and median milliseconds to the first token and to the whole answer.

    Args:
        generate: takes the number of a question and how many tokens to generate at most, and returns the text.
    """
    answers = [generate(index, MAX_NEW_TOKENS) for index in range(count)]  # also the warm-up
    seconds: dict[int, list[float]] = {1: [], MAX_NEW_TOKENS: []}
    for _ in range(REPEATS):
        for index in range(count):
            for max_new_tokens, times in seconds.items():
                begin = time.perf_counter()
                generate(index, max_new_tokens)
                times.append(time.perf_counter() - begin)
    first, whole = (1000 * statistics.median(times) for times in seconds.values())
    return {"answers": answers, "first_token_ms": first, "answer_ms": whole}


def chat(question: str) -> list[dict[str, Any]]:
    """A question about one picture, for the chat template."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def read(request: dict[str, Any]) -> dict[str, Any]:
    """For each length the hits of the queries, the answers, and their times."""
    import torch  # here, so that the other process can import this module at no cost
    from transformers import pipeline
    from transformers.utils import logging

    from fwd2bot import Fwd2BotSummary

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    search = pipeline(
        "fwd2bot-retrieval",
        model=request["model"],
        device=request["device"],
        dtype=torch.float32,
        model_kwargs={"stage": "text"},
    )
    model, processor = search.model, search.processor
    stored = Fwd2BotSummary.load_file(request["summaries"])
    prompts = [
        processor(text=[processor.apply_chat_template(chat(question), add_generation_prompt=True)]).to(search.device)
        for _, question in request["questions"]
    ]
    results = {}
    for length in LENGTHS:
        summary = stored.truncate(length)
        summaries = [summary[number] for number, _ in request["questions"]]

        def generate(index: int, max_new_tokens: int, summaries: list[Any] = summaries) -> str:
            inputs = prompts[index]
            ids = model.generate_from_summary(
                summaries[index], **inputs, max_new_tokens=max_new_tokens, do_sample=False
            )
            new = ids[:, inputs["input_ids"].shape[1] :]
            return processor.batch_decode(new, skip_special_tokens=True)[0].strip()

        results[str(length)] = {
            "tokens": length,
            "hits": search(request["queries"], summary=summary, top_k=TOP_K),
            **measure(generate, len(prompts)),
        }
    return {"parameters": model.num_parameters(), "lengths": results}


if __name__ == "__main__":
    print(json.dumps(read(json.load(sys.stdin))))
