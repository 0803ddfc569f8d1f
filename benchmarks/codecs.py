"""What the store's codecs cost: bytes per picture against answers and retrieval, for each codec at each length k.

    python benchmarks/codecs.py [CHECKPOINT] [--pictures 500] [--questions 6] [--plot FILE.png] [--output FILE.json]

Held-out drawn scenes. Questions are answered from the summaries as the store gives them back. Sentences look for their
picture among all: full descriptions for their own, short captions for one that they are true of. They do so by the
embedding in the store, which is kept in float16 beside the tokens whatever the codec; by one pooled from the decoded
tokens; and by late interaction (`rerank="maxsim"`) over the 50 best. The store's default codec is the one of fewest
bytes that keeps 99% of fp16's answers at every length.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines.embedded import default_checkpoint
from fwd2bot.pipelines.store.codecs import CODECS, decode, encode, token_bytes
from fwd2bot.pipelines.store.searching import maxsim
from fwd2bot.summary_fwd2bot import pool_summary
from fwd2bot.training.evaluate import _answer, _answer_from_summary, _by_kind, _rng, _slices
from fwd2bot.training.metrics import recall_at_k
from fwd2bot.training.scenes import ask, describe, render, scene, short_caption, truth_table

KEEPS = 0.99  # of fp16's answers
CANDIDATES = 50


def measure(
    checkpoint: str, pictures: int, questions: int, lengths: Sequence[int] | None, batch_size: int
) -> dict[str, Any]:
    """All figures, shares between 0 and 1."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    start = time.perf_counter()
    scenes = [scene("test", index) for index in range(pictures)]
    asked = [((i,), question) for i, one in enumerate(scenes) for question in ask(one, _rng("ask", one), questions)]
    images = [render(one) for one in scenes]
    batches = (processor.process_images(images[part]) for part in _slices(pictures, batch_size))
    whole = torch.cat([model.compress(**batch).tokens for batch in batches])  # (N, k_max, d)
    short = [short_caption(one, _rng("short", one)) for one in scenes]
    texts = {
        "full": compress_texts(model, processor, [describe(one, _rng("full", one)) for one in scenes], batch_size),
        "short": compress_texts(model, processor, [caption.text for caption in short], batch_size),
    }
    true = {"full": torch.eye(pictures, dtype=torch.bool), "short": torch.from_numpy(truth_table(short, scenes)).T}
    width = whole.shape[-1]
    settings = []
    for k in model.config.summary_lengths if lengths is None else lengths:
        stored = pool_summary(whole, k).half().float()
        for codec in CODECS:
            tokens = torch.from_numpy(decode(encode(whole[:, :k].numpy(), codec), codec, width).copy())
            summary = Fwd2BotSummary(tokens)

            def generate(
                shown: list[tuple[int]], prompts: list[str], summary: Fwd2BotSummary = summary
            ) -> torch.Tensor:
                return _answer_from_summary(model, processor, summary[[index for (index,) in shown]], prompts)

            answers = _by_kind(asked, _answer(asked, processor.backbone_processor, batch_size, generate))
            row = {
                "k": k,
                "codec": codec,
                "token_bytes": k * token_bytes(codec, width),
                "row_bytes": k * token_bytes(codec, width) + 2 * width,
                "answers": answers["all"],
            }
            for name, text in texts.items():
                query = pool_summary(text, k)
                scores = query @ stored.T  # (M, N)
                late = late_interaction(scores, text[:, :k], tokens)
                for kind, values in (
                    ("stored", scores),
                    ("decoded", query @ pool_summary(tokens, k).T),
                    ("maxsim", late),
                ):
                    row[f"{name}_{kind}"] = recall_at_k(values, true[name], [1])["recall@1"]
            settings.append(row)
            print(f"k={k} {codec}: {json.dumps(row)}", file=sys.stderr)
    return {
        "checkpoint": Path(checkpoint).name,
        "pictures": pictures,
        "questions": len(asked),
        "settings": settings,
        "default": default_codec(settings),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def compress_texts(model: Any, processor: Any, texts: list[str], batch_size: int) -> torch.Tensor:
    parts = (processor.process_texts(texts[part]) for part in _slices(len(texts), batch_size))
    return torch.cat([model.compress(**part).tokens for part in parts])


def late_interaction(scores: torch.Tensor, texts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The best candidates of each row of `scores` `(M, N)` ordered anew; all others come behind them."""
    ranked = torch.full_like(scores, -2.0)
    for row, best in enumerate(scores.topk(min(CANDIDATES, scores.shape[1])).indices):
        ranked[row, best] = maxsim(texts[row], tokens[best])
    return ranked


def default_codec(settings: list[dict[str, Any]]) -> str:
    """The codec of fewest bytes that keeps `KEEPS` of fp16's answers at every length."""
    exact = {row["k"]: row["answers"] for row in settings if row["codec"] == "fp16"}
    sizes: dict[str, int] = {}
    for codec in CODECS:
        rows = [row for row in settings if row["codec"] == codec]
        if all(row["answers"] >= KEEPS * exact[row["k"]] for row in rows):
            sizes[codec] = sum(row["token_bytes"] for row in rows)
    return min(sizes, key=sizes.get)


def table(result: dict[str, Any]) -> str:
    names = [name for name in result["settings"][0] if name not in ("k", "codec")]
    lines = [f"{'k':>3} {'codec':<6}" + "".join(f"{name:>14}" for name in names)]
    for row in result["settings"]:
        cells = [row[name] if isinstance(row[name], int) else f"{100 * row[name]:.1f}" for name in names]
        lines.append(f"{row['k']:>3} {row['codec']:<6}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, f"default codec: {result['default']}"])


def plot(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"answers": "questions answered right, %", "full_decoded": "description finds its picture, recall@1, %"}
    lowest = 100 * min(row[name] for row in result["settings"] for name in panels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 4), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for codec, marker in zip(CODECS, "os^", strict=True):
            rows = [row for row in result["settings"] if row["codec"] == codec]
            sizes, values = [row["token_bytes"] for row in rows], [100 * row[name] for row in rows]
            axis.plot(sizes, values, marker=marker, label=codec)
            for row, size, value in zip(rows, sizes, values, strict=True) if name == "answers" else ():
                axis.annotate(f"k={row['k']}", (size, value), textcoords="offset points", xytext=(4, -10), fontsize=7)
        axis.set(xscale="log", xlabel="bytes of a picture's tokens", ylabel=label, ylim=(lowest // 10 * 10, 101))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{result['checkpoint']}: {result['pictures']} scenes, {result['questions']} questions")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a Fwd2Bot (default: the embedded one)")
    parser.add_argument("--pictures", type=int, default=500, help="held-out scenes (default: 500)")
    parser.add_argument("--questions", type=int, default=6, help="about each scene (default: 6)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="K", help="default: the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args()
    if min(args.pictures, args.questions, args.batch_size) < 1:
        parser.error("pictures, questions and batch size must be at least 1")
    with torch.inference_mode():
        result = measure(
            args.checkpoint or str(default_checkpoint()), args.pictures, args.questions, args.lengths, args.batch_size
        )
    print(table(result))
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
