"""How much memory each way of loading a model takes: all of it, one stage, adapters upon a backbone, merged exports.

    python benchmarks/stage_memory.py [--layers 22] [--width 2048] [--output stage_memory.json]

A LLaVA with random weights in bfloat16 is made in a temporary folder (by default CLIP ViT-L/14-336 and a Llama of 1.1
billion parameters, some 3 GB), with two LoRA of rank 16, and loaded in every way by a process of its own, on the CPU.
Told are the bytes of its weights, and, beyond what importing took, the memory that the process keeps once each weight
was read, how much of this is its own, and what it took at most. What is not its own are pages of the mapped files,
which processes share, and which the system takes back when it needs room. Random weights take the memory of trained
ones. Prints a table and one line of JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "everything": "AutoModel.from_pretrained(f'{folder}/full')",
    "stage='compress'": "AutoModel.from_pretrained(f'{folder}/full', stage='compress')",
    "stage='generate'": "AutoModel.from_pretrained(f'{folder}/full', stage='generate')",
    "stage='compress', apart": "AutoModel.from_pretrained(f'{folder}/full', stage='compress', merge_adapters=False)",
    "stage='generate', apart": "AutoModel.from_pretrained(f'{folder}/full', stage='generate', merge_adapters=False)",
    "stage='text'": "AutoModel.from_pretrained(f'{folder}/full', stage='text')",
    "adapters and backbone": "AutoModel.from_pretrained(f'{folder}/adapters')",
    "merged for compress": "AutoModel.from_pretrained(f'{folder}/compress')",
    "merged for generate": "AutoModelForCausalLM.from_pretrained(f'{folder}/generate')",
}
LOAD = """
import gc, json, sys
import fwd2bot, torch
from transformers import AutoModel, AutoModelForCausalLM
fwd2bot.Fwd2BotForConditionalGeneration
folder = sys.argv[1]

def memory(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

begin, own = memory("VmRSS"), memory("RssAnon")
model = {way}
for value in model.parameters():  # a weight in a mapped file takes memory once it is read
    value.max()
gc.collect()
weights = {{value.data_ptr(): value.numel() * value.element_size() for value in model.parameters()}}
result = {{
    "weights": sum(weights.values()),
    "resident": memory("VmRSS") - begin,
    "own": memory("RssAnon") - own,
    "peak": memory("VmHWM") - begin,
}}
print(json.dumps(result))
"""


def make_checkpoints(folder: Path, layers: int, width: int) -> None:
    """Write the model in full, as adapters beside its backbone, and merged."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

    tokens = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, "<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template="<image>",
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32_064,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 512),
        ),
        image_token_index=3,
    )
    torch.set_default_dtype(torch.bfloat16)
    backbone = LlavaForConditionalGeneration(config).eval()
    backbone.save_pretrained(folder / "backbone")
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=32)
    model.config.backbone_name_or_path = str(folder / "backbone")
    processor = Fwd2BotProcessor(
        LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, vision_feature_select_strategy="default")
    )
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "adapters", adapter_only=True)
    for stage in ("compress", "generate"):
        model.merge_and_export(stage, folder / stage, processor)


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes by way of loading: of the weights, resident, and at most."""
    found = {}
    for name, way in WAYS.items():
        done = subprocess.run(
            [sys.executable, "-c", LOAD.format(way=way), str(folder)],
            capture_output=True,
            text=True,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode != 0:
            raise RuntimeError(f"Loading {name} failed:\n{done.stderr}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="of the language model (default: 22)")
    parser.add_argument("--width", type=int, default=2048, help="of the language model (default: 2048)")
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoints(folder, arguments.layers, arguments.width)
        found = measure(folder)
        disk = {place.name: size_on_disk(place) for place in sorted(folder.iterdir())}
    print("| loaded | weights, MB | resident, MB | of it its own, MB | at most, MB |\n|---|---:|---:|---:|---:|")
    for name, sizes in found.items():
        figures = " | ".join(f"{sizes[one] / 1e6:,.0f}" for one in ("weights", "resident", "own", "peak"))
        print(f"| {name} | {figures} |")
    print("on disk, MB: " + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in disk.items()))
    result = {
        "memory": found,
        "disk": disk,
        "layers": arguments.layers,
        "width": arguments.width,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
