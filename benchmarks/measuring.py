"""What the benchmarks of speed share: models of three sizes, opponents, interleaved timing, memory, and the report."""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.pipelines.embedded import default_checkpoint

# `small` has the layers of CLIP ViT-B/16 at 224 pixels and of SmolLM-135M, `1b` those of CLIP ViT-L/14 at 336 pixels
# and of a Llama of 1.1 billion parameters, `7b` those of LLaVA-1.5-7B.
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 16},
        "text": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3},
    },
    "1b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
        "text": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
        | {"num_key_value_heads": 4},
    },
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
}
QUESTION = "What colour is the thing at the top of the picture?"


# Models


def load(
    size: str,
    num_summary_tokens: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **sizes: dict[str, int],
) -> tuple[Any, Any, int]:
    """A whole model, its processor, and the side in pixels of what it reads.

    Args:
        size: "tiny", the embedded checkpoint; or one of `SIZES`, with random weights, which take the time of trained.
        device: where it is made, so that a large one needs no main memory.
        sizes: `vision` and `text`: fields that replace those of the size.
    """
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    if size == "tiny":
        model = AutoModel.from_pretrained(default_checkpoint(), dtype=dtype).to(device)
        return model.eval(), processor, model.config.backbone_config.vision_config.image_size
    tokenizer = processor.backbone_processor.tokenizer
    vision, text = ({**SIZES[size][part], **sizes.get(part, {})} for part in ("vision", "text"))
    side, patch = vision["image_size"], vision["patch_size"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=16384, **text),
        image_token_index=processor.backbone_processor.image_token_id,
    )
    with torch.device(device):
        backbone = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=num_summary_tokens)
    model = model.to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype)  # and no buffers: rotary frequencies stay float32
            if ".lora_B." in name:  # zero in a new model
                parameter.normal_(0, 0.01)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    bare = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.backbone_processor.chat_template,
    )
    return model.eval(), Fwd2BotProcessor(bare), side


def stages_of(model: Any, *stages: str | None) -> list[Any]:
    """The model as a process of each stage loads it, from a checkpoint; not on the CPU, from its adapters."""
    with tempfile.TemporaryDirectory() as folder:
        if model.device.type != "cpu":
            model.save_pretrained(folder, adapter_only=True)
            return [upon_backbone(folder, stage, model) for stage in stages]
        model.save_pretrained(folder)
        return [copy_of(folder, stage, model) for stage in stages]


def copy_of(folder: str, stage: str | None, model: Any) -> Any:
    loaded = AutoModel.from_pretrained(folder, stage=stage, dtype=model.dtype).eval().to(model.device)
    for parameter in loaded.parameters():  # its file is about to go
        parameter.data = parameter.data.clone()
    return loaded


def upon_backbone(folder: str, stage: str | None, model: Any) -> Any:
    """The same with a copy of the backbone where it is: a large one is neither written nor merged on the CPU."""
    backbone = copy.deepcopy(bare_backbone(model))
    merged = {"merge_adapters": True} if stage in ("compress", "generate") else {}
    return AutoModel.from_pretrained(folder, stage=stage, backbone=backbone, **merged).eval()


def bare_backbone(model: Any) -> PreTrainedModel:
    """The backbone without anything of ours, on the same weights."""
    with torch.device("meta"):
        bare = type(model.backbone)(copy.deepcopy(model.backbone.config))
    bare.load_state_dict(_bare_state(model.backbone), assign=True)
    _compute_buffers(bare, model.backbone)
    bare.generation_config = copy.deepcopy(model.generation_config)
    return bare.eval()


def bare_language_model(model: Any) -> PreTrainedModel:
    """The language model alone, as transformers has it: the floor of answering."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.get_text_config()))
    state = {f"model.{name}": value for name, value in _bare_state(model.get_decoder()).items()}
    state |= {f"lm_head.{name}": value for name, value in model.get_output_embeddings().state_dict().items()}
    bare.load_state_dict(state, assign=True)
    _compute_buffers(bare.model, model.get_decoder())
    bare.generation_config = copy.deepcopy(model.generation_config)
    return bare.eval()


def _bare_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer.", "."): value
        for name, value in module.state_dict().items()
        if ".lora_" not in name and not name.endswith("summary_queries")
    }


def _compute_buffers(bare: torch.nn.Module, source: torch.nn.Module) -> None:
    """Buffers that no state dict holds, such as rotary frequencies."""
    buffers = dict(source.named_buffers())
    for name, value in list(bare.named_buffers()):
        if value.is_meta:
            parent, _, last = name.rpartition(".")
            setattr(bare.get_submodule(parent), last, buffers[name])


def drawn_pictures(count: int, side: int) -> list[Image.Image]:
    """Pictures of coarse random colours."""
    colours = np.random.RandomState(0).randint(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side)) for one in colours]


def prompts(processor: Any, count: int, pictures: int = 1, question: str = QUESTION) -> list[str]:
    """The same question about so many pictures, `count` times."""
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return [processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)] * count


# Measuring


def interleaved(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each run in each repetition; in turn, every other time backwards, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for repetition in range(repetitions):
        for name in list(runs)[:: -1 if repetition % 2 else 1]:
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios of one run to another in the same repetition."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that torch allocates at most in a run, beyond what was allocated before it, results included."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(0, allocated.max())) if len(allocated) else 0


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through `(log size, log value)`: 1 for growth in proportion, 0 for none."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# Command line and report


def parser_of(description: str, sizes: Sequence[str] = ("tiny", *SIZES)) -> argparse.ArgumentParser:
    """With the options that all have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--size", choices=sizes, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--repetitions", type=_positive, default=9, help="of each run (default: 9)")
    parser.add_argument("--threads", type=_positive, default=1, help="of torch on the CPU (default: 1)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give 1 or more")
    return number


def set_up(args: argparse.Namespace, num_summary_tokens: int = 16) -> tuple[Any, Any, int]:
    """`load` as the options say."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return load(args.size, num_summary_tokens, args.device, getattr(torch, args.dtype))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **versions,
    }


def report(args: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print the rows as a table and as one line of JSON; write and draw them where that was asked for."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |")
    options = {name: value for name, value in vars(args).items() if name not in ("output", "plot")}
    result = {"options": options, **machine(args), "rows": rows, **more}
    print(json.dumps(result, default=str))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw(args: argparse.Namespace, lines: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
    """Both axes logarithmic, one line a name; nothing without `--plot`."""
    with _axes(args) as axes:
        for name, (xs, ys) in lines.items() if axes else ():
            axes.plot(xs, ys, marker="o", label=name)
        if axes:
            axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)


def draw_parts(args: argparse.Namespace, bars: dict[str, dict[str, float]], unit: str) -> None:
    """A bar for each name, of its parts one after the other; nothing without `--plot`."""
    with _axes(args) as axes:
        for part in dict.fromkeys(part for parts in bars.values() for part in parts) if axes else ():
            names = [name for name in bars if part in bars[name]]
            before = [sum(list(bars[name].values())[: list(bars[name]).index(part)]) for name in names]
            axes.barh(names, [bars[name][part] for name in names], left=before, label=part)
        if axes:
            axes.set(xlabel=unit)


@contextmanager
def _axes(args: argparse.Namespace) -> Iterator[Any]:
    """Where to draw what goes to the file that `--plot` names; None without it."""
    if not args.plot:
        yield None
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    yield axes
    axes.set(title=f"{args.size}, {args.dtype}, {args.device}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(args.plot, dpi=120)
    pyplot.close(figure)
