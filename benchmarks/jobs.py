"""Whole jobs, and where their time goes: index pictures into a store, then answer questions over it.

    python benchmarks/jobs.py [--size tiny|small] [--pictures 10000] [--questions 1000] [--file-side N]

Indexing is `SummaryStore.add` on JPEG files, with a model loaded with `stage="compress"`. Its parts are measured
alone, on a sample of the same files and batches: decoding, preprocessing to tensors, the model. Add reads and decodes
while the model runs, and what the sum of the parts does not explain is storage and the rest.
Answering is: look up by a sentence, read the summary, answer in 8 tokens, in batches of 16, with a model loaded with
`stage="text"`. `benchmarks/indexing.py` compares the job to `compress` alone, `benchmarks/rag.py` to the originals.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import draw_parts, parser_of, prompts, report, set_up, stages_of

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.training.scenes import render, scene

BATCH, SAMPLE = 16, 256


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, function: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def index(model: Any, processor: Any, files: list[Path], folder: Path, k: int) -> tuple[Any, dict[str, Any]]:
    """The store, and a row."""
    store = SummaryStore.create(folder, model, processor, num_summary_tokens=k)
    start = time.perf_counter()
    store.add(files, batch_size=BATCH, progress=False)
    seconds = time.perf_counter() - start
    clock, sample = Clock(), files[:SAMPLE]
    for first in range(0, len(sample), BATCH):
        pictures = [clock.run("decode", processor.load_image, file) for file in sample[first : first + BATCH]]
        inputs = clock.run("preprocess", processor.process_images, pictures)
        clock.run("model", model.compress, **inputs, num_summary_tokens=k)
    parts = {name: value * len(files) / len(sample) for name, value in clock.seconds.items()}
    parts["storage and rest"] = seconds - sum(parts.values())
    shares = {f"{name}, %": 100 * value / seconds for name, value in parts.items()}
    feeding = parts["decode"] + parts["preprocess"]
    rate = {"a second": len(files) / seconds, "model / decode and preprocess": parts["model"] / feeding}
    return store, {"job": "index", "count": len(files), "seconds": seconds, **rate, **shares}


def answer(model: Any, processor: Any, store: Any, questions: int) -> dict[str, Any]:
    """A row."""
    clock, texts = Clock(), [f"Where is thing {number}?" for number in range(questions)]
    k = store.config.num_summary_tokens
    start = time.perf_counter()
    for first in range(0, questions, BATCH):
        part = texts[first : first + BATCH]
        vectors = clock.run("embed", model.embed, **processor.process_texts(part), num_summary_tokens=k)
        found = [clock.run("look up", store.search, vector, top_k=1)[0]["id"] for vector in vectors.numpy()]
        shown = clock.run("read", store.summary, found)
        inputs = clock.run("prompts", processor, text=prompts(processor, len(part)))
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        clock.run("answer", model.generate_from_summary, shown, **inputs, **options)
    seconds = time.perf_counter() - start
    shares = {f"{name}, %": 100 * value / seconds for name, value in clock.seconds.items()}
    return {"job": "answer", "count": questions, "seconds": seconds, "a second": questions / seconds, **shares}


def main() -> None:
    parser = parser_of(__doc__, ("tiny", "small"))
    parser.add_argument("--pictures", type=int, default=10_000, help="to index (default: 10000)")
    parser.add_argument("--questions", type=int, default=1_000, help="to answer (default: 1000)")
    parser.add_argument(
        "--file-side", type=int, metavar="PIXELS", help="of the square files (default: what the model reads)"
    )
    parser.add_argument("--k", type=int, default=8, help="length of the summaries (default: 8)")
    args = parser.parse_args()
    model, processor, side = set_up(args)
    side = args.file_side or side
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        files = []
        for number in range(args.pictures):
            files.append(Path(name, f"{number:05}.jpg"))
            render(scene("test", number)).resize((side, side)).save(files[-1], quality=90)
        compressor, reader = stages_of(model, "compress", "text")
        store, indexed = index(compressor, processor, files, Path(name, "store"), args.k)
        answered = answer(reader, processor, store, args.questions)
    report(args, [indexed, answered])
    jobs = {
        job["job"]: {name: value for name, value in job.items() if name.endswith("%")} for job in (indexed, answered)
    }
    draw_parts(args, jobs, "% of the time")


if __name__ == "__main__":
    main()
