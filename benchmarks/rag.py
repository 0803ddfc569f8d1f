"""Time to find pictures in a store and answer a question about them: from summaries, and from the pictures read anew.

    python benchmarks/rag.py [--model PATH] [--repeats 15] [--threads 1] [--new-tokens 8] [--plot FILE.png]

A store of the gallery (60 drawn scenes, the largest k) is made in a temporary folder. Each question retrieves n = 1 to
5 pictures by its text and is answered with all of them in one prompt: by `fwd2bot-rag` from the first 8 and from the
first 2 tokens of each summary, and with `fallback="image"` by the uncompressed backbone, which opens the n originals.
Retrieval is the same for all three and counted for all; every answer has the same number of new tokens. The three are
measured in turn in each repeat, after a warm-up; medians over repeats are told. Prints a table and one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline
from transformers.utils import logging

import fwd2bot  # noqa: F401, registers the pipelines
from fwd2bot.pipelines.embedded import default_checkpoint, gallery
from fwd2bot.pipelines.store import SummaryStore

WAYS = {
    "uncompressed": {"fallback": "image"},
    "k=8": {"num_summary_tokens": 8},
    "k=2": {"num_summary_tokens": 2},
}
NUMBERS = (1, 2, 3, 4, 5)
STEPS = ("retrieve", "read", "answer")


def measure(model: Path, folder: Path, repeats: int, new_tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the seconds of each step and of all, by way and number of pictures."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load = {"model": str(model), "device": "cpu", "dtype": torch.float32}
    compress = pipeline("fwd2bot-compress", **load)
    store = SummaryStore.create(folder / "store", compress.model, compress.processor)
    store.add([picture.path for picture in gallery()], progress=False)
    pipe = pipeline("fwd2bot-rag", model=compress.model, processor=compress.processor, store=store, device="cpu")
    questions = [question.text for picture in gallery()[:repeats] for question in picture.questions[:1]]
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    seen: dict[str, dict[str, list[dict[str, float]]]] = {way: {str(n): [] for n in NUMBERS} for way in WAYS}
    for repeat in range(-1, repeats):  # the first warms up
        for number in NUMBERS:
            for way, options in WAYS.items():
                result = pipe(questions[repeat % len(questions)], top_k=number, **options, **length)
                if repeat >= 0:
                    seconds = result["seconds"]
                    seen[way][str(number)].append({**seconds, "all": sum(seconds.values())})
    return {
        way: {
            number: {step: statistics.median(one[step] for one in taken) for step in (*STEPS, "all")}
            for number, taken in numbers.items()
        }
        for way, numbers in seen.items()
    }


def format_table(found: dict[str, Any]) -> str:
    """A row for each number of pictures: milliseconds of all, and of retrieve + read + answer."""
    lines = ["| pictures | " + " | ".join(f"{way}, ms" for way in found) + " |", "|---:|" + "---:|" * len(found)]
    for number in map(str, NUMBERS):
        cells = []
        for numbers in found.values():
            steps = " + ".join(f"{1000 * numbers[number][step]:.1f}" for step in STEPS)
            cells.append(f"{1000 * numbers[number]['all']:.1f} ({steps})")
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Milliseconds of a question over the number of its pictures, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for way, numbers in found.items():
        axes.plot(list(map(int, numbers)), [1000 * one["all"] for one in numbers.values()], marker="o", label=way)
    axes.set(xlabel="pictures", ylabel="retrieval and answer, ms", ylim=(0, None), xticks=NUMBERS)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint (default: the embedded one)")
    parser.add_argument("--repeats", type=int, default=15, help="questions, each asked in every way (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=8, help="of every answer (default: 8)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    for name in ("repeats", "threads", "new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    torch.set_num_threads(arguments.threads)
    model = arguments.model or default_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, Path(folder), arguments.repeats, arguments.new_tokens)
    print(format_table(found))
    if arguments.plot:
        plot(found, arguments.plot)
    result = {
        "seconds": found,
        "model": model.name,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "new_tokens": arguments.new_tokens,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
