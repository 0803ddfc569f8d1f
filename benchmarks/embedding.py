"""Embedding texts and pictures against the bare forward on the same rows, and long texts beside short ones.

    python benchmarks/embedding.py [--size tiny|small|1b|7b] [--batches 1 8 32] [--words 8 64] [--output FILE.json]

- texts: `embed` of a model loaded with `stage="compress"`, and of one loaded whole (adapters apart), beside the bare
  language model on rows of the same length, no logits;
- pictures: the same beside the bare backbone without its head;
- mixed: texts of 2 to 64 words in batches of 16, in the order they came and sorted by length, padding and all.

On tensors that are ready, in turn; ratios are medians over repetitions.
"""

from typing import Any

import numpy as np
import torch
from measuring import (
    bare_backbone,
    draw,
    drawn_pictures,
    interleaved,
    medians,
    parser_of,
    ratio,
    report,
    set_up,
    stages_of,
)

WORDS = "a red square lies left of the small blue circle and above two green things".split()
MIXED, MIXED_BATCH = 64, 16


def text_of(words: int) -> str:
    return " ".join(WORDS[index % len(WORDS)] for index in range(words))


def row_of(what: str, seconds: dict[str, list[float]], count: int, tokens: int) -> dict[str, Any]:
    found = medians(seconds)
    return {
        "what": what,
        "batch": count,
        "tokens": tokens,
        **{f"{name}, ms": 1000 * value for name, value in found.items()},
        "a second": count / found["one stage"],
        "one stage / bare": ratio(seconds, "one stage", "bare"),
        "apart / bare": ratio(seconds, "apart", "bare"),
    }


def measure(models: dict[str, Any], inputs: Any, what: str, k: int, repetitions: int) -> dict[str, Any]:
    """A row for inputs of the processor."""
    count = len(inputs["input_ids"])
    ids = torch.cat([inputs["input_ids"], torch.full((count, k), 5, device=inputs["input_ids"].device)], 1)
    row = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    runs = {
        "one stage": lambda: models["one stage"].embed(**inputs, num_summary_tokens=k),
        "apart": lambda: models["apart"].embed(**inputs, num_summary_tokens=k),
        "bare": lambda: models["bare"].base_model(**row, use_cache=False),
    }
    return row_of(what, interleaved(runs, repetitions), count, ids.shape[1])


def mixed(model: Any, processor: Any, k: int, repetitions: int) -> dict[str, float]:
    """Texts a second, as they came and sorted by length."""
    lengths = np.random.RandomState(0).randint(2, 65, MIXED)

    def batches(order: Any) -> list[Any]:
        texts = [text_of(words) for words in order]
        parts = [texts[start : start + MIXED_BATCH] for start in range(0, MIXED, MIXED_BATCH)]
        return [processor.process_texts(part).to(model.device) for part in parts]

    ready = {"as they came": batches(lengths), "sorted": batches(sorted(lengths))}
    runs = {
        name: lambda parts=parts: [model.embed(**part, num_summary_tokens=k) for part in parts]
        for name, parts in ready.items()
    }
    seconds = interleaved(runs, repetitions)
    found = {f"{name}, texts/s": MIXED / value for name, value in medians(seconds).items()}
    return {**found, "sorted / as they came": ratio(seconds, "sorted", "as they came")}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sizes (default: 1 8 32)")
    parser.add_argument("--words", type=int, nargs="+", default=[8, 64], help="of a text (default: 8 64)")
    parser.add_argument("--k", type=int, default=8, help="length (default: 8)")
    args = parser.parse_args()
    model, processor, side = set_up(args)
    with torch.inference_mode():
        models = {"apart": model, "bare": bare_backbone(model)}
        [models["one stage"]] = stages_of(model, "compress")
        rows = []
        for batch in args.batches:
            for words in args.words:
                inputs = processor.process_texts([text_of(words)] * batch).to(model.device)
                rows.append(measure(models, inputs, f"texts of {words} words", args.k, args.repetitions))
            inputs = processor.process_images(drawn_pictures(batch, side)).to(model.device, model.dtype)
            rows.append(measure(models, inputs, "pictures", args.k, args.repetitions))
        found = mixed(models["one stage"], processor, args.k, args.repetitions)
    report(args, rows, mixed=found)
    print(", ".join(f"{name}: {value:.2f}" for name, value in found.items()))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    lines = {kind: (args.batches, [row["a second"] for row in rows if row["what"] == kind]) for kind in kinds}
    draw(args, lines, "in a batch", "a second")


if __name__ == "__main__":
    main()
