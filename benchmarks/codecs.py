"""What the store's codecs cost: bytes per picture against answers and retrieval, for each codec at each length k.

    python benchmarks/codecs.py [CHECKPOINT] [--pictures 500] [--questions 6] [--captions 200] [--plot FILE.png]

Held-out drawn scenes. Questions are answered from the summaries as the store gives them back. Sentences look for their
picture among all: full descriptions for their own, short captions for one that they are true of. They do so by the
embedding in the store, which is kept in float16 beside the tokens whatever the codec; by one pooled from the decoded
tokens; and by late interaction (`rerank="maxsim"`) over the 50 best. Captions are full descriptions, written greedily
from the summaries as the store gives them back, and compared with five true ones each. Beside their scores stand those
of the uncompressed backbone, and of a sixth true description: wordings differ, so it does not reach the top, either,
and a model that always takes the usual wording scores more. The store's default codec is the one of fewest bytes that
keeps 99% of fp16's answers at every length. Takes some minutes.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
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
from fwd2bot.training.answering import (
    ANSWER_TOKENS,
    CAPTION_TOKENS,
    answer,
    answer_from_summary,
    answer_uncompressed,
    ask_for_captions,
    image_tokens,
    right_by_kind,
    scene_rng,
    slices,
)
from fwd2bot.training.caption_scores import caption_scores
from fwd2bot.training.metrics import recall_at_k
from fwd2bot.training.scenes import ask, describe, render, scene, short_caption, truth_table

KEEPS = 0.99  # of fp16's answers
CANDIDATES = 50
REFERENCES = 5  # true descriptions of a picture


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


COLUMNS: dict[str, tuple[str, Callable]] = {
    "k": ("k", str),
    "codec": ("codec", str),
    "token_bytes": ("bytes of tokens", "{:,}".format),
    "row_bytes": ("bytes with embedding", "{:,}".format),
    "answers": ("questions right, %", _percent),
    "cider": ("captions: CIDEr", "{:.2f}".format),
    "bleu": ("BLEU, %", _percent),
    "chrf": ("chrF, %", _percent),
    "rouge_l": ("ROUGE-L, %", _percent),
    "full_stored_recall@1": ("full description, recall@1, %", _percent),
    "full_decoded_recall@1": ("pooled from the tokens, %", _percent),
    "full_maxsim_recall@1": ("maxsim, %", _percent),
    "short_stored_recall@1": ("short caption, recall@1, %", _percent),
    "short_stored_recall@5": ("recall@5, %", _percent),
    "short_maxsim_recall@1": ("maxsim, recall@1, %", _percent),
    "short_maxsim_recall@5": ("recall@5, %", _percent),
}


def measure(
    checkpoint: str, pictures: int, questions: int, captions: int, lengths: Sequence[int] | None, batch_size: int
) -> dict[str, Any]:
    """All figures: shares between 0 and 1, CIDEr between 0 and 10."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    start = time.perf_counter()
    scenes = [scene("test", index) for index in range(pictures)]
    asked = [((i,), one) for i, shown in enumerate(scenes) for one in ask(shown, scene_rng("ask", shown), questions)]
    images = [render(one) for one in scenes]
    batches = (processor.process_images(images[part]) for part in slices(pictures, batch_size))
    whole = torch.cat([model.compress(**batch).tokens for batch in batches])  # (N, k_max, d)
    short = [short_caption(one, scene_rng("short", one)) for one in scenes]
    texts = {
        "full": compress_texts(
            model, processor, [describe(one, scene_rng("full", one)) for one in scenes], batch_size
        ),
        "short": compress_texts(model, processor, [caption.text for caption in short], batch_size),
    }
    true = {"full": torch.eye(pictures, dtype=torch.bool), "short": torch.from_numpy(truth_table(short, scenes)).T}
    width = whole.shape[-1]
    true_captions = [
        [describe(one, scene_rng(f"caption {number}", one)) for number in range(REFERENCES + 1)]
        for one in scenes[:captions]
    ]
    references = [row[1:] for row in true_captions]

    def generated(generate: Callable) -> dict[str, float]:
        """The share of right answers and the scores of captions; `generate(shown, prompts, largest length)`."""
        bare = processor.backbone_processor
        answers = answer(asked, bare, batch_size, partial(generate, length=ANSWER_TOKENS))
        figures = {"answers": right_by_kind(asked, answers)["all"]}
        if captions:
            told = answer(ask_for_captions(captions), bare, batch_size, partial(generate, length=CAPTION_TOKENS))
            figures |= caption_scores(told, references)
        return figures

    def from_pictures(shown: list[tuple[int]], prompts: list[str], length: int) -> torch.Tensor:
        shown_images = [[images[index]] for (index,) in shown]
        return answer_uncompressed(model, processor.backbone_processor, shown_images, prompts, length)

    uncompressed = generated(from_pictures)
    settings = []
    for k in model.config.summary_lengths if lengths is None else lengths:
        stored = pool_summary(whole, k).half().float()
        for codec in CODECS:
            tokens = torch.from_numpy(decode(encode(whole[:, :k].numpy(), codec), codec, width).copy())
            summary = Fwd2BotSummary(tokens)

            def from_summary(
                shown: list[tuple[int]], prompts: list[str], length: int, summary: Fwd2BotSummary = summary
            ) -> torch.Tensor:
                return answer_from_summary(model, processor, summary[[i for (i,) in shown]], prompts, length)

            row = {
                "k": k,
                "codec": codec,
                "token_bytes": k * token_bytes(codec, width),
                "row_bytes": k * token_bytes(codec, width) + 2 * width,
                **generated(from_summary),
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
                    for recall, value in recall_at_k(values, true[name], [k for k in (1, 5) if k <= pictures]).items():
                        row[f"{name}_{kind}_{recall}"] = value
            settings.append(row)
            print(f"k={k} {codec}: {json.dumps(row)}", file=sys.stderr)
    return {
        "checkpoint": Path(checkpoint).name,
        "pictures": pictures,
        "questions": len(asked),
        "captions": captions,
        "width": width,
        "image_tokens": image_tokens(processor.backbone_processor),
        "uncompressed": uncompressed,
        "another_true_caption": caption_scores([row[0] for row in true_captions], references) if captions else {},
        "settings": settings,
        "default": default_codec(settings),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def compress_texts(model: Any, processor: Any, texts: list[str], batch_size: int) -> torch.Tensor:
    parts = (processor.process_texts(texts[part]) for part in slices(len(texts), batch_size))
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
    """Markdown: a row per setting, the uncompressed backbone first, another true caption last."""
    tokens = result["image_tokens"]
    first = {
        "k": tokens,
        "codec": "uncompressed",
        "token_bytes": 2 * tokens * result["width"],
        **result["uncompressed"],
    }
    rows = [first, *result["settings"], {"codec": "another true description", **result["another_true_caption"]}]
    columns = {name: (title, form) for name, (title, form) in COLUMNS.items() if any(name in row for row in rows)}
    lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---:|---|" + "---:|" * (len(columns) - 2))
    for row in rows:
        cells = [form(row[name]) if name in row else "" for name, (_, form) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Default codec: {result['default']}."])


def plot(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "answers": ("questions answered right, %", 100),
        "cider": ("descriptions from the summary, CIDEr", 1),
        "full_decoded_recall@1": ("description finds its picture, recall@1, %", 100),
    }
    panels = {name: panel for name, panel in panels.items() if name in result["settings"][0]}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (name, (label, scale)) in zip(axes, panels.items(), strict=True):
        for codec, marker in zip(CODECS, "os^", strict=True):
            rows = [row for row in result["settings"] if row["codec"] == codec]
            sizes, values = [row["token_bytes"] for row in rows], [scale * row[name] for row in rows]
            axis.plot(sizes, values, marker=marker, label=codec)
            for row, size, value in zip(rows, sizes, values, strict=True) if name == "answers" else ():
                axis.annotate(f"k={row['k']}", (size, value), textcoords="offset points", xytext=(4, -10), fontsize=7)
        if name in result["uncompressed"]:
            axis.axhline(scale * result["uncompressed"][name], color="grey", linestyle="--", label="uncompressed")
        axis.set(xscale="log", xlabel="bytes of a picture's tokens", ylabel=label)
        axis.set_ylim(0, None) if name == "cider" else axis.set_ylim(axis.get_ylim()[0] // 10 * 10, 101)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(
        f"{result['checkpoint']}: {result['pictures']} scenes, {result['questions']} questions, "
        f"{result['captions']} descriptions"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a Fwd2Bot (default: the embedded one)")
    parser.add_argument("--pictures", type=int, default=500, help="held-out scenes (default: 500)")
    parser.add_argument("--questions", type=int, default=6, help="about each scene (default: 6)")
    parser.add_argument(
        "--captions", type=int, default=200, help="pictures to describe, the first so many; 0 for none (default: 200)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="K", help="default: the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args()
    if min(args.pictures, args.questions, args.batch_size) < 1:
        parser.error("pictures, questions and batch size must be at least 1")
    if not (args.captions == 0 or 2 <= args.captions <= args.pictures):
        parser.error(f"captions must be 0, or between 2 and the number of pictures, {args.pictures}")
    with torch.inference_mode():
        result = measure(
            args.checkpoint or str(default_checkpoint()),
            args.pictures,
            args.questions,
            args.captions,
            args.lengths,
            args.batch_size,
        )
    print(table(result))
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
