"""A step of Fwd2Bot's training against its bare parts: time, memory, and on a GPU the share of the matrix peak.

    python benchmarks/training_step.py [--size small|7b] [--batch 8] [--chunk N] [--repetitions 7] [--profile]

- step: `ChunkedStep` over a batch (an image, a caption and a conversation for each sample) and the optimiser's step;
- parts: the bare backbone with one PEFT LoRA, forward and backward, on the same tokens: once on the rows of the
  compress pass (images and captions, with queries), once on those of the generate pass (k tokens for an image); and
  the optimiser's step on its one adapter. Both in turn, medians of the repetitions;
- plain LoRA: the bare backbone trained on the same conversations with all image tokens, for its memory.

Each is measured for memory in a process of its own: beyond the weights, the resident set's peak on the CPU, the
allocator's on CUDA. `small` has random weights in float32 (64 image tokens); `7b` the sizes of LLaVA-1.5-7B in
bfloat16, with 576 image tokens and gradient checkpointing, and wants 80 GB. On CUDA also: the floating point
operations of a step as torch counts them beside a large matrix product timed in the same run; and with `--largest`
the largest batch, doubled until memory ends, without and with chunks of `--chunk` samples.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.chunked import ChunkedStep, as_batch, count_labels
from fwd2bot.training.optimizers import build_optimizer

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
        | {"image_size": 128, "patch_size": 16},
        "text": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        | {"vocab_size": 8192},
        "dtype": torch.float32,
    },
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"vocab_size": 32064},
        "dtype": torch.bfloat16,
    },
}
LENGTH, RANK = 16, 16  # k of every summary, and the rank of every LoRA
PROMPT, CAPTION, QUESTION, ANSWER = 10, 16, 24, 24  # tokens


def build_backbone(size: str, device: torch.device) -> LlavaForConditionalGeneration:
    """A LLaVA of this size with random weights."""
    chosen = SIZES[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**chosen["vision"]),
        text_config=LlamaConfig(**chosen["text"], max_position_embeddings=2048),
        image_token_index=3,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=chosen["dtype"], attn_implementation="sdpa")


def make_batch(backbone: LlavaForConditionalGeneration, batch: int, chunk: int | None) -> dict[str, Any]:
    """Random samples, as a collator gives them."""
    vision, words = backbone.config.vision_config, backbone.config.text_config.vocab_size
    device, image = backbone.device, backbone.config.image_token_id
    tokens = (vision.image_size // vision.patch_size) ** 2

    def drawn(count: int, length: int) -> torch.Tensor:
        return torch.randint(10, words, (count, length), device=device)

    def chunk_of(count: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.full((count, tokens), image, device=device), drawn(count, PROMPT)], 1)
        asked = torch.cat([torch.full((count, 1), image, device=device), drawn(count, QUESTION + ANSWER)], 1)
        pixels = torch.randn(count, 3, vision.image_size, vision.image_size, device=device, dtype=backbone.dtype)
        return {
            "compress_input_ids": ids,
            "compress_attention_mask": torch.ones_like(ids),
            "compress_pixel_values": pixels,
            "input_ids": asked,
            "attention_mask": torch.ones_like(asked),
            "labels": torch.cat([torch.full_like(asked[:, :-ANSWER], -100), asked[:, -ANSWER:]], 1),
        }

    size = chunk or batch
    counts = [min(size, batch - first) for first in range(0, batch, size)]
    captions = drawn(batch, CAPTION + PROMPT).split(counts)
    return {
        "chunks": [chunk_of(count) for count in counts],
        "text_chunks": [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in captions],
        "text_image": torch.arange(batch, device=device),
        "text_image_mask": torch.ones(batch, batch, dtype=torch.bool, device=device),
    }


def fwd2bot_step(size: str, device: torch.device, batch: int, chunk: int | None) -> Callable[[], None]:
    """A step of training, ready to be called."""
    backbone = build_backbone(size, device)
    options = {"num_summary_tokens": LENGTH, "summary_lengths": [LENGTH], "lora_rank": RANK}
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, **options).train()
    for parameter in model.mark_trainable().values():
        parameter.data = parameter.data.float()
    if size == "7b":
        model.gradient_checkpointing_enable()
    collated = make_batch(backbone, batch, chunk)
    optimizer = _optimizer(model)
    step = ChunkedStep(model)

    def run() -> None:
        step(as_batch(collated), count_labels(collated), backward=lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()

    return run


def bare_backbone(size: str, device: torch.device) -> LlavaForConditionalGeneration:
    """The backbone with one LoRA of PEFT on its language model, and nothing of ours."""
    backbone = build_backbone(size, device).train().requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets), backbone.get_decoder())
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if size == "7b":
        backbone.gradient_checkpointing_enable()
    return backbone


def bare_parts(size: str, device: torch.device, batch: int) -> Callable[[], None]:
    """Forward and backward of the bare backbone, twice, on the tokens of a step in one chunk."""
    backbone = bare_backbone(size, device)
    collated = make_batch(backbone, batch, None)
    [chunk], [texts] = collated["chunks"], collated["text_chunks"]
    optimizer = _optimizer(backbone)

    def more(ids: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat([ids, torch.full_like(ids[:, :1], 5).expand(-1, count)], 1)

    images, captions = more(chunk["compress_input_ids"], LENGTH), more(texts["input_ids"], LENGTH)
    talk, labels = more(chunk["input_ids"][:, 1:], LENGTH), more(chunk["labels"][:, 1:], LENGTH)
    labels[:, -LENGTH:] = -100
    learnt = labels[:, 1:] != -100

    def run() -> None:
        for ids, given in ((images, {"pixel_values": chunk["compress_pixel_values"]}), (captions, {})):
            hidden = backbone.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
            hidden.last_hidden_state[:, -LENGTH:].float().mean().backward()
        logits = backbone(input_ids=talk, attention_mask=torch.ones_like(talk), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1][learnt].float(), labels[:, 1:][learnt]).backward()
        optimizer.step()  # of one adapter, where the step has two
        optimizer.zero_grad()

    return run


def plain_lora(size: str, device: torch.device, batch: int) -> Callable[[], None]:
    """LoRA training of the backbone on the same conversations, with all image tokens."""
    backbone = bare_backbone(size, device)
    [chunk] = make_batch(backbone, batch, None)["chunks"]
    image = chunk["compress_input_ids"][:, :-PROMPT]
    ids = torch.cat([image, chunk["input_ids"][:, 1:]], 1)
    labels = torch.cat([torch.full_like(image, -100), chunk["labels"][:, 1:]], 1)
    optimizer = _optimizer(backbone)

    def run() -> None:
        pixels = chunk["compress_pixel_values"]
        given = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids), "use_cache": False}
        backbone(input_ids=ids, labels=labels, **given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, "adamw", learning_rate=1e-4, matrix_learning_rate=1e-4, weight_decay=0.0)


WAYS: dict[str, Callable[..., Callable[[], None]]] = {
    "step": fwd2bot_step,
    "parts": lambda size, device, batch, chunk: bare_parts(size, device, batch),
    "plain LoRA": lambda size, device, batch, chunk: plain_lora(size, device, batch),
}


def seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _measure_memory(way: str, size: str, device: torch.device, batch: int, chunk: int | None, found: Any) -> None:
    run = WAYS[way](size, device, batch, chunk)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            run()
        found.put(torch.cuda.max_memory_allocated() - before)
        return
    before = _resident()
    for _ in range(2):
        run()
    found.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(field[1]) * 1024 for field in fields if field[0] == "VmRSS:")


def memory(way: str, *settings: Any) -> int | None:
    """Bytes beyond the weights at the peak of two steps, in a process of its own; None where they do not fit."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=_measure_memory, args=(way, *settings, found))
    process.start()
    process.join()
    return found.get() if process.exitcode == 0 else None


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: left @ right, device) for _ in range(20))
    return 2 * 8192**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--chunk", type=int, help="samples of a chunk; default: the whole batch at once")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--largest", action="store_true", help="CUDA: look for the largest batch")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = (options.size, device, options.batch, options.chunk)
    found: dict[str, Any] = {"memory": {way: memory(way, *settings) for way in WAYS}}
    runs = {way: WAYS[way](*settings) for way in ("step", "parts")}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(options.repetitions):
        for way, run in runs.items():
            times[way].append(seconds(run, device))
    found["seconds"] = {way: statistics.median(values) for way, values in times.items()}
    found["ratio"] = found["seconds"]["step"] / found["seconds"]["parts"]
    found["images_per_second"] = options.batch / found["seconds"]["step"]
    if device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            runs["step"]()
        peak = matrix_peak(device, SIZES[options.size]["dtype"])
        found["share_of_peak"] = counter.get_total_flops() / found["seconds"]["step"] / peak
        found["peak_tflops"] = peak / 1e12
    if options.profile:
        with torch.profiler.profile() as profile:
            runs["step"]()
        column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=column, row_limit=15))
    runs.clear()
    if options.largest and device.type == "cuda":
        for name, chunk in (("whole", None), ("chunked", options.chunk or 8)):
            batch = options.batch
            while batch <= 16384 and memory("step", options.size, device, 2 * batch, chunk) is not None:
                batch *= 2
            found[f"largest_batch_{name}"] = batch
    print("| | seconds | memory beyond the weights, MB |\n|---|---:|---:|")
    for way, size in found["memory"].items():
        shown = f"{found['seconds'][way]:.3f}" if way in found["seconds"] else ""
        print(f"| {way} | {shown} | {'does not fit' if size is None else f'{size / 1e6:.0f}'} |")
    found |= {"size": options.size, "batch": options.batch, "chunk": options.chunk, "threads": torch.get_num_threads()}
    found |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()}
    found |= {"torch": torch.__version__}
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
