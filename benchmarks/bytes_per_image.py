"""Bytes of one picture: as JPEG, as image tokens, as their key/value cache, and as a summary in each codec at each k.

    python benchmarks/bytes_per_image.py [--pictures FOLDER] [--checkpoint PATH] [--plot FILE.png] [--output FILE.json]

Of the checkpoint (default: the embedded one) everything is measured on real tensors: the image tokens that its
connector gives, the cache after its language model has read them, summaries as the store's codecs write them; and the
files of a store of these pictures, which hold source and metadata, too. Of LLaVA-1.5-7B and Qwen2.5-VL-7B the same is
computed from their configs. JPEG is that of the pictures given, in the middle: a JPEG file as it is, any other picture
saved with quality 90. The default is the gallery of drawn scenes, much smaller files than photos.
"""

import argparse
import io
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from fwd2bot.pipelines.embedded import GALLERY, default_checkpoint
from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.codecs import CODECS, encode, token_bytes

LENGTHS = (1, 2, 4, 8, 16, 32)  # of the computed columns
MEASURED = 8  # pictures that the checkpoint reads
FP16 = 2  # bytes of a number
QUALITY = 90
JPEG = "JPEG"


@dataclass(frozen=True)
class Backbone:
    """Sizes of a language model and of the image tokens that it reads for a picture."""

    tokens: int
    width: int
    layers: int
    kv_heads: int
    head_dim: int


def qwen_tokens(width: int, height: int) -> int:
    """Image tokens of Qwen2.5-VL: both sides to the nearest multiple of 28 pixels, a token for each 28x28.

    Source: `smart_resize` of transformers' image processor of Qwen2-VL, between its smallest and largest areas.
    """
    return round(width / 28) * round(height / 28)


COMPUTED = {
    # config.json of llava-hf/llava-1.5-7b-hf and, for its language model, of lmsys/vicuna-7b-v1.5:
    # 336 / 14 = 24, 24 * 24 patches; hidden_size 4096, 32 layers, 32 heads of 128, each with keys and values.
    "LLaVA-1.5-7B": Backbone(tokens=576, width=4096, layers=32, kv_heads=32, head_dim=128),
    # config.json of Qwen/Qwen2.5-VL-7B-Instruct: hidden_size 3584, 28 layers, 28 heads of 128, 4 of keys and values.
    "Qwen2.5-VL-7B, 1024x768": Backbone(qwen_tokens(1024, 768), width=3584, layers=28, kv_heads=4, head_dim=128),
}


def compute(backbone: Backbone) -> dict[str, int]:
    """Bytes by what is kept."""
    cache = backbone.tokens * backbone.layers * 2 * backbone.kv_heads * backbone.head_dim * FP16
    kept = {"key/value cache, fp16": cache, "image tokens, fp16": backbone.tokens * backbone.width * FP16}
    return kept | {
        name: size
        for k in LENGTHS
        for codec in CODECS
        for name, size in _summary(k, codec, k * token_bytes(codec, backbone.width), backbone.width * FP16)
    }


def measure(checkpoint: str, files: list[Path]) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes by what is kept, of tensors in memory; and what a store of these pictures takes on the disk."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    pictures = [processor.load_image(file) for file in files[:MEASURED]]
    bare = processor.backbone_processor
    inputs = bare(images=pictures, text=[bare.image_token] * len(pictures), return_tensors="pt", padding=True)
    is_image = inputs["input_ids"] == model.config.backbone_config.image_token_id  # (N, T)
    backbone = model.backbone
    features = backbone.get_image_features(
        pixel_values=inputs["pixel_values"], return_dict=True
    ).pooler_output  # N of (T_image, d)
    tokens = torch.stack(list(features)).half()
    cache = backbone(**inputs, use_cache=True).past_key_values
    image_tokens = int(is_image[0].sum())
    kept = {
        "key/value cache, fp16": sum(
            part[0, :, is_image[0]].half().nbytes for layer in cache.layers for part in (layer.keys, layer.values)
        ),
        "image tokens, fp16": tokens[0].nbytes,
    }
    if tokens[0].shape[0] != image_tokens:
        raise ValueError(f"The connector gives {tokens[0].shape[0]} vectors for {image_tokens} image tokens.")
    whole = model.compress(**processor.process_images(pictures))
    for k in model.config.summary_lengths:
        summary = whole.truncate(k)
        embedding = model.embed(summary=summary, num_summary_tokens=k).half()[0].nbytes
        for codec in CODECS:
            kept.update(_summary(k, codec, encode(summary.tokens.numpy(), codec)[0].nbytes, embedding))
    with tempfile.TemporaryDirectory() as folder:
        store = SummaryStore.create(Path(folder) / "pictures.store", model, processor, num_summary_tokens=8)
        store.add(files, progress=False)
        store.optimize()
        stats = store.stats()
    names = ("rows", "bytes_per_image", "bytes_by_column", "num_summary_tokens", "codec")
    return kept, {name: stats[name] for name in names} | {"image_tokens": image_tokens}


def jpeg_bytes(file: Path) -> int:
    """Of a JPEG file as it is, or of another picture once it is one."""
    with Image.open(file) as picture:
        if picture.format == "JPEG":
            return file.stat().st_size
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
        return buffer.tell()


def table(columns: dict[str, dict[str, int]]) -> str:
    """Markdown; a summary's row without and with its embedding in one cell."""
    names = list(dict.fromkeys(name for sizes in columns.values() for name in sizes if not name.endswith("embedding")))
    names.sort(key=lambda name: name.startswith("k="))
    lines = ["| of one picture, bytes | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in names:
        cells = []
        for sizes in columns.values():
            both = [f"{sizes[one]:,}" for one in (name, f"{name} + embedding") if one in sizes]
            cells.append(" / ".join(both))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(columns: dict[str, dict[str, int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(columns), figsize=(5 * len(columns), 5), layout="constrained")
    for axis, (title, sizes) in zip(axes, columns.items(), strict=True):
        rest = {name: size for name, size in sizes.items() if not name.startswith("k=")}
        shown = dict(sorted(rest.items(), key=lambda pair: -pair[1]))
        shown |= {name: size for name, size in sizes.items() if name.endswith("embedding")}
        colours = ["tab:blue" if name.startswith("k=") else "tab:grey" for name in shown]
        axis.barh(list(shown), list(shown.values()), color=colours)
        for row, size in enumerate(shown.values()):
            axis.annotate(f"{size:,}", (size, row), textcoords="offset points", xytext=(3, -3), fontsize=7)
        axis.set(xscale="log", xlabel="bytes of one picture", title="\n".join(title.rsplit(", ", 1)))
        axis.set_xlim(min(sizes.values()) / 2, max(sizes.values()) * 30)
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def _summary(k: int, codec: str, size: int, embedding: int) -> list[tuple[str, int]]:
    name = f"k={k}, {codec}"
    return [(name, size), (f"{name} + embedding", size + embedding)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=GALLERY, metavar="FOLDER", help="default: the gallery")
    parser.add_argument("--checkpoint", help="folder or Hub id of a Fwd2Bot (default: the embedded one)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args()
    endings = Image.registered_extensions()
    files = sorted(file for file in args.pictures.rglob("*") if file.suffix.lower() in endings)
    if not files:
        parser.error(f"{args.pictures} holds no picture; name a folder of pictures")
    checkpoint = args.checkpoint or str(default_checkpoint())
    with torch.inference_mode():
        measured, stored = measure(checkpoint, files)
    jpeg = round(statistics.median(jpeg_bytes(file) for file in files))
    columns = {f"{Path(checkpoint).name}, {stored['image_tokens']} image tokens": {JPEG: jpeg, **measured}}
    for name, backbone in COMPUTED.items():
        columns[f"{name}, {backbone.tokens} image tokens"] = compute(backbone)
    print(table(columns))
    kind = f"k={stored['num_summary_tokens']}, {stored['codec']}"
    on_disk = f"A store of {stored['rows']} of them ({kind}) takes {stored['bytes_per_image']:,.0f} bytes a picture."
    print(f"\nJPEG: median of {len(files)} pictures. {on_disk}")
    result = {"columns": columns, "store": stored, "pictures": len(files)}
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(columns, args.plot)


if __name__ == "__main__":
    main()
