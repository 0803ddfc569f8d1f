"""The main job: `python -m fwd2bot.pipelines.demo`, or `make demo`.

Compresses the gallery, writes the summaries to disk, and lets a new process without vision tower search them and
answer questions from the file alone. Prints one table, and saves a picture of the queries with their hits.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline
from transformers.utils import logging

from .demo_reader import LENGTHS, chat, measure
from .embedded import GalleryPicture, default_checkpoint, gallery, showcase
from .rag_context import backbone_inputs

STORED = torch.float16
BATCH_SIZE = 20
SUMMARIES = "summaries.safetensors"
MARGIN, TEXT_WIDTH, LINE, SIDE = 12, 200, 20, 120  # pixels of the picture of hits


class DemoError(Exception):
    """Something that the user can mend; the message says how."""


def run(model: Path, output: Path, device: str = "cpu", say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the main job, write `output` and the summaries beside it, and return what was measured.

    Args:
        model: folder of a checkpoint. output: where the picture of the hits goes.
        device: where the models run. say: takes what is printed, line by line.

    Raises:
        DemoError: when the folder cannot be written, the model is not there, or the new process failed.
    """
    _check_writable(output)
    if not (model / "config.json").is_file():
        raise DemoError(f"There is no checkpoint in {model}. Give --model a folder that save_pretrained has written.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pictures, asked = gallery(), showcase()
    names = [picture.path.name for picture in pictures]
    compress = pipeline("fwd2bot-compress", model=str(model), device=device, dtype=torch.float32)
    images = [picture.image for picture in pictures]
    compress(images[:BATCH_SIZE], batch_size=BATCH_SIZE)  # warm up
    begin = time.perf_counter()
    summary = compress(images, num_summary_tokens=max(LENGTHS), batch_size=BATCH_SIZE).to(STORED)
    seconds = time.perf_counter() - begin
    path = output.parent / SUMMARIES
    summary.save_file(path)
    parameters = compress.model.num_parameters()
    say(f"{len(images)} pictures compressed to {max(LENGTHS)} vectors each in {seconds:.2f} s, stored in {path}.")

    results = {"uncompressed": _uncompressed(compress, pictures, names, asked)}
    read = _read_in_new_process(model, path, names, asked, device)
    say(
        f"A new process loaded {read['parameters'] / 1e6:.1f} of {parameters / 1e6:.1f} million parameters, no vision "
        "tower, and answers from that file alone:\n"
    )
    width = summary.tokens.shape[-1]
    results |= {f"k={length}": result for length, result in read["lengths"].items()}
    for result in results.values():
        result["bytes"] = result["tokens"] * width * STORED.itemsize
    say(_table(results, asked, names))
    say(
        f"\nBytes are those of the vectors in {str(STORED).removeprefix('torch.')}. Times are medians of the model "
        f"alone, after a warm-up, on this machine ({device}, {platform.machine()}, {torch.get_num_threads()} "
        "thread(s)); other machines differ."
    )
    hits = read["lengths"][str(max(LENGTHS))]["hits"]
    _replace(output, lambda temporary: draw_hits(asked["queries"], hits, images, names).save(temporary, "PNG"))
    say(f"The queries with their hits at k={max(LENGTHS)}: {output}")
    return results


def draw_hits(
    queries: list[dict[str, Any]], hits: list[list[dict[str, Any]]], images: list[Image.Image], names: list[str]
) -> Image.Image:
    """A row for each query: its text, and its hits from the best on; those that it is true of in a green frame."""
    columns = max(len(row) for row in hits)
    size = (2 * MARGIN + TEXT_WIDTH + columns * (SIDE + MARGIN), MARGIN + len(queries) * (SIDE + LINE + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    for row, (query, found) in enumerate(zip(queries, hits, strict=True)):
        top = MARGIN + row * (SIDE + LINE + MARGIN)
        text = _wrap(f"“{query['text']}”", TEXT_WIDTH, lambda line: draw.textlength(line, large))
        draw.multiline_text((MARGIN, top + 10), text, "black", large, spacing=5)
        for column, hit in enumerate(found):
            left = 2 * MARGIN + TEXT_WIDTH + column * (SIDE + MARGIN)
            sheet.paste(images[hit["index"]].resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            if names[hit["index"]] in query["files"]:
                draw.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), outline=(20, 150, 60), width=4)
            draw.text((left + SIDE / 2, top + SIDE + 4), f"{hit['score']:.2f}", "dimgrey", small, anchor="ma")
    return sheet


def _uncompressed(
    compress: Any, pictures: list[GalleryPicture], names: list[str], asked: dict[str, Any]
) -> dict[str, Any]:
    """The bare backbone on all image tokens: its answers, and its times with the vision tower."""
    model, inputs = compress.model, []
    for question in asked["questions"]:
        picture = pictures[names.index(question["file"])]
        prompt = compress.processor.apply_chat_template(chat(question["text"]), add_generation_prompt=True)
        inputs.append(backbone_inputs(compress.processor, prompt, [picture.image]).to(compress.device))

    def generate(index: int, max_new_tokens: int) -> str:
        ids = model.generate_uncompressed(**inputs[index], max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, inputs[index]["input_ids"].shape[1] :]
        return compress.processor.batch_decode(new, skip_special_tokens=True)[0].strip()

    tokens = int((inputs[0]["input_ids"] == model.image_token_id).sum())
    return {"tokens": tokens, "hits": None, **measure(generate, len(inputs))}


def _read_in_new_process(
    model: Path, path: Path, names: list[str], asked: dict[str, Any], device: str
) -> dict[str, Any]:
    request = {
        "model": str(model),
        "summaries": str(path),
        "device": device,
        "queries": [query["text"] for query in asked["queries"]],
        "questions": [[names.index(question["file"]), question["text"]] for question in asked["questions"]],
    }
    done = subprocess.run(
        [sys.executable, "-m", "fwd2bot.pipelines.demo_reader"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise DemoError(f"The new process that reads {path} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(results: dict[str, dict[str, Any]], asked: dict[str, Any], names: list[str]) -> str:
    """One column for each way to keep a picture, one row for each figure, query and question."""
    rows = [["", *results]]
    rows.append(["tokens per image", *(str(result["tokens"]) for result in results.values())])
    rows.append(["bytes per image", *(f"{result['bytes']:,}" for result in results.values())])
    for name, key in (("time to first token", "first_token_ms"), ("time to answer", "answer_ms")):
        rows.append([name, *(f"{result[key]:.1f} ms" for result in results.values())])
    rows.append([])
    for index, query in enumerate(asked["queries"]):
        cells = []
        for result in results.values():
            if result["hits"] is None:
                cells.append("-")
            else:
                number = result["hits"][index][0]["index"]
                cells.append(f"picture {number}" + ("" if names[number] in query["files"] else " (wrong)"))
        rows.append([query["text"], *cells])
    rows.append([])
    for index, question in enumerate(asked["questions"]):
        answers = [result["answers"][index] for result in results.values()]
        cells = [answer + ("" if answer == question["answer"] else " (wrong)") for answer in answers]
        rows.append([f"picture {names.index(question['file'])}: {question['text']}", *cells])
    widths = [max(len(row[column]) for row in rows if row) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True) if row else [("", 0)]
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def _wrap(text: str, width: float, length: Callable[[str], float]) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if length(longer) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)


def _check_writable(output: Path) -> None:
    if output.is_dir():
        raise DemoError(f"{output} is a folder. Name a file in it: --output {output / 'hits.png'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise DemoError(
            f"Nothing can be written into {output.parent} ({error.strerror or error}). Choose another place: "
            "--output FOLDER/hits.png"
        ) from error


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path`, then put it in its place: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--output", type=Path, default=Path("demo/hits.png"), help="the picture to write (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="folder of another checkpoint (default: the one in the package)")
    parser.add_argument("--device", default="cpu", help="where the models run, such as cuda (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        run(arguments.model or default_checkpoint(), arguments.output, arguments.device)
    except (DemoError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
