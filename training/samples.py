"""What a model says and finds while it trains: answers and a retrieval sheet, as files and where the run reports."""

from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .validation import Seen, Validation

SIDE, BEST, TEXT_WIDTH = 96, 5, 260  # pixels of a picture and of the caption's column; pictures in a row
RIGHT, WRONG = (30, 160, 60), (200, 200, 200)


class SampleCallback(TrainerCallback):
    """Every so many steps, the answers to some validation samples, captions among them, and what their captions find.

    Files: `samples/step-000100.txt` and `.png` in the folder of the run; the same goes to TensorBoard, Trackio and
    W&B, whichever of them the run reports to.

    Args:
        every: steps. count: samples that are shown.
    """

    def __init__(self, trainer: Trainer, validation: Validation, every: int, count: int = 8):
        self.trainer, self.validation, self.every, self.count = trainer, validation, every, count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.accelerator.autocast():
            seen = self.validation.look(model, self.validation.samples[: self.count], describe=True)  # by all alike
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        text, sheet = answer_text(seen), retrieval_sheet(seen)
        place = folder / f"step-{state.global_step:06d}"
        if text:
            place.with_suffix(".txt").write_text(text, encoding="utf-8")
        if sheet is not None:
            sheet.save(place.with_suffix(".png"))
        for callback in self.trainer.callback_handler.callbacks:
            report(callback, state.global_step, text, sheet)


def report(callback: TrainerCallback, step: int, text: str, sheet: Image.Image | None) -> None:
    """Hand answers and sheet to the log of a reporting callback; any other is passed over."""
    markdown = text.replace("\n", "  \n")  # two blanks: a new line
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        if text:
            callback.tb_writer.add_text("samples/answers", markdown, step)
        if sheet is not None:
            callback.tb_writer.add_image("samples/retrieval", np.asarray(sheet), step, dataformats="HWC")
    elif isinstance(callback, TrackioCallback):
        trackio = callback._trackio
        figures = {"samples/answers": trackio.Markdown(markdown)} if text else {}
        figures |= {"samples/retrieval": trackio.Image(sheet)} if sheet is not None else {}
        trackio.log({**figures, "train/global_step": step})
    elif isinstance(callback, WandbCallback):
        wandb = callback._wandb
        figures = {"samples/answers": wandb.Html(f"<pre>{escape(text)}</pre>")} if text else {}
        figures |= {"samples/retrieval": wandb.Image(sheet)} if sheet is not None else {}
        wandb.log({**figures, "train/global_step": step})


def answer_text(seen: Seen) -> str:
    """The questions with their expected and their given answers."""
    lines = [f"{one.question}\n  expected: {one.expected}\n  answered: {one.answer}\n" for one in seen.answered]
    return "\n".join(lines)


def retrieval_sheet(seen: Seen) -> Image.Image | None:
    """Row by row a caption and the pictures nearest to it, its own in a green frame; None without captions."""
    if not seen.captions or not seen.images:
        return None
    scores, own = seen.scores()
    groups = list(dict.fromkeys(seen.image_groups))
    pictures = [seen.images[seen.image_groups.index(group)] for group in groups]
    best = scores.topk(min(BEST, len(pictures)), dim=1).indices.tolist()
    sheet = Image.new("RGB", (TEXT_WIDTH + SIDE * len(best[0]), SIDE * len(best)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, found) in enumerate(zip(seen.captions, best, strict=True)):
        draw.multiline_text((4, row * SIDE + 4), "\n".join(wrap(caption, 40)[:6]), fill="black")
        for column, picture in enumerate(found):
            corner = (TEXT_WIDTH + column * SIDE, row * SIDE)
            shown = pictures[picture].convert("RGB").resize((SIDE - 8, SIDE - 8))
            frame = (*corner, corner[0] + SIDE - 2, corner[1] + SIDE - 2)
            draw.rectangle(frame, fill=RIGHT if own[row, picture] else WRONG)
            sheet.paste(shown, (corner[0] + 3, corner[1] + 3))
    return sheet
