"""A Fwd2Bot as a model of `lmms-eval`, answering from summaries, or from all image tokens as the baseline.

    python -m lmms_eval --model fwd2bot --model_args pretrained=hub/mine,num_summary_tokens=8 --tasks pope

Needs the extra `lmms-eval`.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.configuration_fwd2bot import check_num_summary_tokens
from fwd2bot.pictures_fwd2bot import load_image

from .answering import slices, uncompressed_inputs
from .recipe import check_dtype

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(f'This needs lmms-eval ({error}). Install it: pip install "fwd2bot[lmms-eval]"') from error

MARK = "<image>"  # where the text of a task shows a picture
SETTINGS = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")  # of a task, that generate() takes


class Fwd2BotLmms(lmms):
    """Greedy or sampled answers to the prompts of generating tasks, with any number of pictures each.

    Args:
        pretrained: folder or Hub id of a Fwd2Bot. revision: of a Hub id.
        num_summary_tokens: length k, default the configured one.
        uncompressed: answer by the bare backbone on all image tokens instead.
        device: default: CUDA if there is one. dtype: of the weights, "float32", "bfloat16" or "float16".
        batch_size: prompts at once.

    Raises:
        ValueError: a length that the model does not have, another dtype, or a batch size that is no whole number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        num_summary_tokens: int | None = None,
        uncompressed: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.uncompressed, self.batch_size = uncompressed, check_batch_size(batch_size)
        self.accelerator = Accelerator()  # by which lmms-eval counts and gathers the rows of several processes
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 or device is None:
            device = self.accelerator.device
        revision = revision or "main"
        self.model = Fwd2BotForConditionalGeneration.from_pretrained(
            pretrained, revision=revision, dtype=getattr(torch, check_dtype(dtype))
        )
        self.model.eval().to(device)
        self.processor = Fwd2BotProcessor.from_pretrained(pretrained, revision=revision)
        self.num_summary_tokens = check_num_summary_tokens(num_summary_tokens, self.model.config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers in the order of the requests."""
        answers: list[str] = [""] * len(requests)
        groups = defaultdict(list)  # what can go through generate() at once
        for place, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            images = [load_image(image) for image in doc_to_visual(self.task_dict[task][split][doc_id]) or []]
            groups[json.dumps(settings, sort_keys=True), bool(images)].append((place, context, images))
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="fwd2bot")
        for (settings, _), rows in groups.items():
            for part in slices(len(rows), self.batch_size):
                said = self._answer(rows[part], json.loads(settings))
                for (place, context, _), text in zip(rows[part], said, strict=True):
                    answers[place] = text
                    self.cache_hook.add_partial("generate_until", (context, json.loads(settings)), text)
                progress.update(len(said))
        progress.close()
        return answers

    @torch.no_grad()
    def _answer(self, rows: list[tuple[int, str, list[Any]]], settings: dict[str, Any]) -> list[str]:
        prompts = [
            self.processor.backbone_processor.apply_chat_template(
                messages(context, len(images)), add_generation_prompt=True
            )
            for _, context, images in rows
        ]
        pictures = [images for _, _, images in rows]
        options = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
        if not options.get("do_sample", options.get("temperature", 0) > 0):
            options = {name: options[name] for name in options if name not in ("temperature", "top_p")}
            options["do_sample"] = False
        options.setdefault("max_new_tokens", 1024)
        generate: Any
        if not pictures[0]:
            inputs = self.processor(text=prompts).to(self.model.device)
            generate = self.model.generate_uncompressed if self.uncompressed else self.model.generate
        elif self.uncompressed:
            inputs = uncompressed_inputs(self.model, self.processor.backbone_processor, pictures, prompts)
            generate = self.model.generate_uncompressed
        else:
            read = self.processor.process_images([image for images in pictures for image in images])
            summary = self.model.compress(**read.to(self.model.device), num_summary_tokens=self.num_summary_tokens)
            inputs = self.processor(text=prompts).to(self.model.device) | {"summary": summary}
            generate = self.model.generate_from_summary
        ids = generate(**inputs, **options)
        said = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = settings.get("until") or []
        return [cut(text.strip(), [until] if isinstance(until, str) else until) for text in said]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Fwd2Bot answers by generation alone; choose tasks of output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("Fwd2Bot has no tasks of several rounds here; choose those of one answer.")


def check_batch_size(batch_size: int | str) -> int:
    """lmms-eval hands on what its command line was given, "auto" as well; ValueError for what is no whole number."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}; there is no automatic one")
    return int(batch_size)


def messages(context: str, images: int) -> list[dict[str, Any]]:
    """The text of a task as a user's turn; pictures stand where it marks them, else before it."""
    pieces = context.split(MARK)
    if len(pieces) != images + 1:
        pieces = [""] * images + [" ".join(piece.strip() for piece in pieces).strip()]
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return [{"role": "user", "content": content}]


def cut(text: str, until: list[str]) -> str:
    """The text before the first of the strings at which a task stops."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text.strip()
