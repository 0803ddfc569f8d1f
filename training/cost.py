"""What a picture costs in each setting: tokens, bytes to keep, cache, and the time until an answer begins."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from fwd2bot.backbone_fwd2bot import merged_token_id

from .answering import uncompressed_inputs

REPEATS = 5


@torch.no_grad()
def costs(
    model: Any, processor: Any, image: Image.Image, prompt: str, lengths: Sequence[int], uncompressed: bool = True
) -> dict[str, dict[str, float | int]]:
    """Costs of one picture with a prompt, for "uncompressed" and each "k=...", at batch size 1.

    - `tokens_per_image`: that the language model reads in the picture's place.
    - `bytes_per_image`: these tokens, two bytes a number: what is kept of a picture.
    - `cache_bytes`: the picture's part of the keys and values after the prompt, over all layers, in their own dtype.
    - `first_token_ms`: from pixel values or a summary, and the prompt's ids, to the first new id; median of five.

    Args:
        model, processor: a Fwd2Bot and its processor; or a plain backbone and its own, with no `lengths`.
        prompt: in the chat template, with one image.
    """
    bare = getattr(processor, "backbone_processor", processor)
    width = model.config.get_text_config().hidden_size
    answers: dict[str, tuple[int, int, Callable[..., Any]]] = {}
    if uncompressed:
        inputs = uncompressed_inputs(model, bare, [[image]], [prompt])
        generate = getattr(model, "generate_uncompressed", model.generate)
        tokens = int((inputs["input_ids"] == merged_token_id(bare)).sum())
        answers["uncompressed"] = (tokens, width, partial(generate, **inputs))
    if lengths:
        summary = model.compress(**processor.process_images([image]).to(model.device))
        inputs = processor(text=[prompt]).to(model.device)
        for k in lengths:
            short = summary.truncate(k)
            answers[f"k={k}"] = (k, short.tokens.shape[-1], partial(model.generate_from_summary, short, **inputs))
    return {
        setting: {
            "tokens_per_image": tokens,
            "bytes_per_image": 2 * numbers * tokens,
            "cache_bytes": round(_cache_bytes(answer) * tokens),
            "first_token_ms": _first_token_ms(answer, model.device),
        }
        for setting, (tokens, numbers, answer) in answers.items()
    }


def _cache_bytes(answer: Callable[..., Any]) -> float:
    """Bytes of keys and values for each token of the prompt; layers of linear attention have none."""
    cache = answer(max_new_tokens=1, do_sample=False, return_dict_in_generate=True).past_key_values
    layers = [layer for layer in cache.layers if hasattr(layer, "keys")]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / cache.get_seq_length()


def _first_token_ms(answer: Callable[..., Any], device: torch.device) -> float:
    times = []
    for _ in range(1 + REPEATS):  # the first one sets up what the others use
        _finish(device)
        begin = time.perf_counter()
        answer(max_new_tokens=1, do_sample=False)
        _finish(device)
        times.append(1000 * (time.perf_counter() - begin))
    return round(statistics.median(times[1:]), 2)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
