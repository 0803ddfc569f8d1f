"""What embeddings lose when they are cut (`truncate_dim`) or quantised (`precision`) in Sentence Transformers.

    python benchmarks/embedding_width.py [CHECKPOINT] [--pictures 500] [--widths 96 48 24] [--output FILE.json]

Sentences find their picture among held-out drawn scenes, and in the gallery, at each width and precision. Cut vectors
are scored by their cosine. int8, own ranges: what `encode(..., precision="int8")` gives for the pictures and for the
sentences, scored by the cosine of the codes. int8, shared ranges: both with the ranges of the pictures, scored by the
cosine of the values that the codes stand for. binary: one bit a number, scored by the bits that agree.
"""

import argparse
import json
import platform
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from fwd2bot.pipelines.embedded import default_checkpoint, gallery
from fwd2bot.training.metrics import recall_at_k
from fwd2bot.training.scenes import describe, render, scene, short_caption, truth_table


def int8_codes(vectors: np.ndarray) -> np.ndarray:
    return quantize_embeddings(vectors, precision="int8").astype(np.float32)


def int8_values(vectors: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The values that the int8 codes of `(N, d)` vectors stand for: the middles of their 256 steps."""
    codes = quantize_embeddings(vectors, precision="int8", ranges=ranges).astype(np.float32)
    return ranges[0] + (codes + 128.5) * (ranges[1] - ranges[0]) / 255


def binary(vectors: np.ndarray) -> np.ndarray:
    """The signs that the bits of `(N, d)` vectors stand for."""
    bits = np.unpackbits(quantize_embeddings(vectors, precision="ubinary"), axis=1, count=vectors.shape[1])
    return bits * 2.0 - 1


def measure(checkpoint: str, pictures: int, widths: list[int], num_summary_tokens: int | None) -> dict[str, Any]:
    """Recall of sentences on the first scenes of the test split, and in the gallery, per width and precision."""
    model = SentenceTransformer(checkpoint, trust_remote_code=True, device="cpu")
    k = {"num_summary_tokens": num_summary_tokens}
    scenes = [scene("test", index) for index in range(pictures)]
    captions = [short_caption(one, random.Random(f"short/{index}")) for index, one in enumerate(scenes)]
    descriptions = [describe(one, random.Random(f"full/{index}")) for index, one in enumerate(scenes)]
    true = torch.from_numpy(truth_table(captions, scenes)).T  # (M captions, N scenes)
    shown = gallery()
    images = model.encode([render(one) for one in scenes], **k)  # (N, d)
    full, short = model.encode(descriptions, **k), model.encode([caption.text for caption in captions], **k)
    gallery_images = model.encode([one.image for one in shown], **k)
    gallery_texts = model.encode([one.description for one in shown], **k)
    width, own = images.shape[1], torch.eye(pictures, dtype=torch.bool)

    def scores(convert: Any, texts: np.ndarray, candidates: np.ndarray) -> torch.Tensor:
        return model.similarity(convert(texts), convert(candidates))

    ranges = np.stack([images.min(0), images.max(0)])
    settings = {"float32": (width, 4 * width, lambda vectors: vectors)}
    settings |= {f"float32, cut to {cut}": (cut, 4 * cut, lambda v, cut=cut: v[:, :cut]) for cut in widths}
    settings["int8, own ranges"] = (width, width, int8_codes)
    settings["int8, shared ranges"] = (width, width, lambda vectors: int8_values(vectors, ranges))
    settings["binary"] = (width, width // 8, binary)
    rows = {}
    for name, (numbers, size, convert) in settings.items():
        rows[name] = {
            "numbers": numbers,
            "bytes": size,
            "full_caption_recall@1": recall_at_k(scores(convert, full, images), own, [1])["recall@1"],
            "short_caption_recall@5": recall_at_k(scores(convert, short, images), true, [5])["recall@5"],
            "gallery_recall@1": recall_at_k(
                scores(convert, gallery_texts, gallery_images), torch.eye(len(shown), dtype=torch.bool), [1]
            )["recall@1"],
        }
    return {
        "checkpoint": Path(checkpoint).name,
        "pictures": pictures,
        "num_summary_tokens": num_summary_tokens or model[0].model.config.num_summary_tokens,
        "settings": rows,
        "versions": {"torch": torch.__version__, "sentence_transformers": sentence_transformers.__version__},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def table(result: dict[str, Any]) -> str:
    measures = ["full_caption_recall@1", "short_caption_recall@5", "gallery_recall@1"]
    lines = [f"{'%':<24}{'bytes':>8}" + "".join(f"{name:>26}" for name in measures)]
    for name, row in result["settings"].items():
        lines.append(f"{name:<24}{row['bytes']:>8}" + "".join(f"{100 * row[name]:>26.1f}" for name in measures))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a Fwd2Bot (default: the embedded one)")
    parser.add_argument("--pictures", type=int, default=500, help="held-out scenes to search among (default: 500)")
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 48, 24], help="numbers to keep of a vector")
    parser.add_argument("--num-summary-tokens", type=int, metavar="K", help="length k (default: the largest)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args()
    if args.pictures < 5 or min(args.widths) < 1:
        sys.exit(f"error: need at least 5 pictures and widths of at least 1, got {args.pictures} and {args.widths}.")
    checkpoint = args.checkpoint or str(default_checkpoint())
    result = measure(checkpoint, args.pictures, args.widths, args.num_summary_tokens)
    print(table(result))
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
