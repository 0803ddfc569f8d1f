"""What the indexing job costs beside the model alone: pictures per second, and the overhead in percent.

    python benchmarks/indexing.py [--size tiny|small|1b] [--pictures 256] [--repetitions 5] [--folder FOLDER]

Over the same pictures in the same batches, in alternating order, medians of the repetitions:

- compress: `model.compress` on tensors that are ready;
- in memory: decoded `PIL.Image` made into tensors by the processor and compressed, batch by batch, and nothing kept;
- files: the same, with each file read and decoded first;
- job, from memory; job, from files: `SummaryStore.add` on these into an empty store, with look-ups, hashes and commits
  (the seconds of its report: making the empty store is not in it).

Two overheads: of the job beyond the same pictures compressed without a store, preprocessing on both sides; and of
everything beyond `model.compress` on ready tensors.

`tiny` is the embedded checkpoint. `small` (the layers of CLIP
ViT-B/16 at 224 pixels and of SmolLM-135M) and `1b` (CLIP ViT-L/14 at 336 pixels and a Llama of 1.1 billion parameters)
have random weights, which take the time of trained ones. Without `--folder` the pictures are drawn scenes as JPEG of
the size that the model reads.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import SIZES, load
from PIL import Image

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.training.scenes import render, scene

WAYS = ("compress", "in memory", "files", "job, from memory", "job, from files")
SAME = {"job, from memory": "in memory", "job, from files": "files"}  # the same pictures, without a store


def ways(
    model: Any, processor: Any, files: Sequence[Path], folder: Path, k: int, batch_size: int
) -> dict[str, Callable[[], float]]:
    """What is timed, by name; each returns its seconds."""
    pictures = [processor.load_image(file) for file in files]
    starts = range(0, len(files), batch_size)
    ready = [processor.process_images(pictures[start : start + batch_size]) for start in starts]

    def compress() -> float:
        start = time.perf_counter()
        for inputs in ready:
            model.compress(**inputs, num_summary_tokens=k)
        return time.perf_counter() - start

    def each_batch(images: Sequence[Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for first in range(0, len(images), batch_size):
                loaded = [processor.load_image(image) for image in images[first : first + batch_size]]
                model.compress(**processor.process_images(loaded), num_summary_tokens=k)
            return time.perf_counter() - start

        return run

    def job(images: Sequence[Any]) -> Callable[[], float]:
        def run() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                store = SummaryStore.create(Path(place) / "store", model, processor, num_summary_tokens=k)
                report = store.add(images, batch_size=batch_size, progress=False)
            if report.added != len(files):
                raise RuntimeError(f"Of {len(files)} pictures {report.added} were added: {report}")
            return report.seconds

        return run

    runs = (compress, each_batch(pictures), each_batch(files), job(pictures), job(list(files)))
    return dict(zip(WAYS, runs, strict=True))


def measure(timed: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way in each repetition; every other one goes through them backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for run in timed.values():  # once to warm up
        run()
    for repetition in range(repetitions):
        for name in list(timed)[:: -1 if repetition % 2 else 1]:
            seconds[name].append(timed[name]())
    return seconds


def distinct(files: list[Path]) -> list[Path]:
    """Without those of equal content, which a store keeps once."""
    return list({file.read_bytes(): file for file in files}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", *SIZES), default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--pictures", type=int, default=256, help="at most (default: 256)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--batch-size", type=int, default=16, help="that of `add` (default: 16)")
    parser.add_argument("--num-summary-tokens", type=int, default=8, metavar="K", help="default: 8")
    parser.add_argument("--folder", type=Path, help="of pictures (default: drawn scenes)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args()
    if min(args.pictures, args.repetitions, args.batch_size, args.num_summary_tokens) < 1:
        parser.error("all numbers must be at least 1")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        model, processor, side = load(args.size)
        folder = args.folder
        if folder is None:
            folder = Path(name, "pictures")
            folder.mkdir()
            for index in range(args.pictures):
                render(scene("test", index)).resize((side, side)).save(folder / f"{index:05}.jpg", quality=90)
        endings = Image.registered_extensions()
        files = distinct(sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings))[: args.pictures]
        if not files:
            parser.error(f"{folder} holds no picture; name a folder of pictures")
        timed = ways(model, processor, files, Path(name), args.num_summary_tokens, args.batch_size)
        seconds = measure(timed, args.repetitions)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.size}: {len(files)} pictures, batches of {args.batch_size}, {torch.get_num_threads()} thread(s)\n")
    print("| | pictures/s | ms a picture | beyond the same without a store, % | beyond compress, % | from - to, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, median in medians.items():
        beyond = [100 * (median / medians[base] - 1) if base else None for base in (SAME.get(name), "compress")]
        same, ready = ("" if value is None else f"{value:+.1f}" for value in beyond)
        spread = f"{min(seconds[name]):.2f} - {max(seconds[name]):.2f}"
        print(
            f"| {name} | {len(files) / median:.1f} | {1000 * median / len(files):.1f} | {same} | {ready} | {spread} |"
        )
    result = {
        "size": args.size,
        "pictures": len(files),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
