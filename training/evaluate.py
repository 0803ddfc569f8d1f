"""`python -m fwd2bot.training.evaluate CHECKPOINT`: what a checkpoint can do on held-out scenes, as table and JSON.

Questions are answered by greedy generation and count when they equal the one canonical answer. A plain LVLM is
evaluated too, uncompressed; a Fwd2Bot is evaluated uncompressed and at each length k. Some of the prompts show several
pictures. With `--data FILE.yaml` a Fwd2Bot is judged on data sets instead of drawn scenes.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fwd2bot import Fwd2BotSummary
from fwd2bot.folder_fwd2bot import check_name

from .answering import (
    Asked,
    answer,
    answer_from_summary,
    answer_uncompressed,
    image_tokens,
    right_by_kind,
    right_by_pictures,
    scene_rng,
    slices,
)
from .commands import command_of
from .metrics import preference, recall_at_k
from .recipe import load_sources
from .scenes import (
    HARD_NEGATIVE_SORTS,
    Scene,
    ask,
    ask_several,
    companions,
    describe,
    hard_negatives,
    render,
    scene,
    short_caption,
    truth_table,
)
from .source_evaluation import check_lengths, evaluate_sources, flatten, format_source_results
from .sources import UnusableRowsError, open_sources

SEVERAL = (2, 3, 4, 5)  # pictures of a prompt that shows several


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    torch.manual_seed(0)
    if args.data is not None:
        results = _evaluate_data(args)
        print(format_source_results(results))
    else:
        results = _evaluate_scenes(args)
        print(format_results(results))
    results["command"] = command_of("evaluate", sys.argv[1:] if arguments is None else arguments)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


def _evaluate_data(args: argparse.Namespace) -> dict[str, Any]:
    try:
        data = load_sources(args.data)
        return evaluate_sources(
            args.checkpoint,
            data,
            open_sources(data),
            lengths=args.lengths,
            limit=args.rows,
            batch_size=args.batch_size or 16,
            max_new_tokens=args.max_new_tokens,
            uncompressed=not args.no_uncompressed,
            dtype=getattr(torch, args.dtype),
            device=args.device,
        )
    except (ValueError, OSError, UnusableRowsError) as error:
        sys.exit(f"error: {error}")


def _evaluate_scenes(args: argparse.Namespace) -> dict[str, Any]:
    return evaluate(
        args.checkpoint,
        split=args.split,
        pictures=args.pictures,
        questions=args.questions,
        retrieval=args.retrieval,
        several=args.several,
        lengths=args.lengths,
        batch_size=args.batch_size or 250,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        shapes_only=args.shapes_only,
    )


@torch.no_grad()
def evaluate(
    checkpoint: str | Path,
    *,
    split: str = "test",
    pictures: int = 2000,
    questions: int = 5,
    retrieval: int | None = None,
    several: int = 2000,
    lengths: Sequence[int] | None = None,
    batch_size: int = 250,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shapes_only: bool = False,
) -> dict[str, Any]:
    """All figures of a checkpoint, shares between 0 and 1.

    Args:
        checkpoint: a Fwd2Bot, or a plain image-text-to-text model (questions only).
        split: of the scenes, "validation" or "test".
        pictures, questions: number of pictures, and of questions about each.
        retrieval: number of pictures (the first) among which is searched. Default: 1000, or all if there are fewer.
        several: number of questions that each show 2 to 5 of the pictures; 0, or a single picture, leaves them out.
        lengths: lengths k. Default: the checkpoint's `summary_lengths`.

    Raises:
        ValueError: a number is out of its range; before any compute.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    _check(config, pictures, questions, retrieval, several, lengths, batch_size)
    is_fwd2bot = config.model_type == "fwd2bot"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
    processor = AutoProcessor.from_pretrained(checkpoint)
    scenes = [scene(split, index, shapes_only=shapes_only) for index in range(pictures)]
    images = [render(one) for one in tqdm(scenes, desc="draw", leave=False)]
    asked = [
        ((i,), question) for i, one in enumerate(scenes) for question in ask(one, scene_rng("ask", one), questions)
    ]
    asked_of_several = _ask_several(scenes, several)
    results: dict[str, Any] = {
        "checkpoint": Path(checkpoint).name,
        "split": split,
        "pictures": pictures,
        "questions": len(asked),
        "several_questions": len(asked_of_several),
        "retrieval_pictures": min(1000, pictures) if retrieval is None else retrieval,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if is_fwd2bot:
        results["fingerprint"] = model.fingerprint

    bare_processor = processor.backbone_processor if is_fwd2bot else processor
    width = model.config.get_text_config().hidden_size

    def answers(generate: Callable) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "answers": right_by_kind(asked, answer(asked, bare_processor, batch_size, generate))
        }
        if asked_of_several:
            given = answer(asked_of_several, bare_processor, batch_size, generate)
            figures["several"] = right_by_kind(asked_of_several, given)
            figures["several_by_pictures"] = right_by_pictures(asked_of_several, given)
        return figures

    def uncompressed(shown: list[tuple[int, ...]], prompts: list[str]) -> torch.Tensor:
        return answer_uncompressed(model, bare_processor, [[images[i] for i in row] for row in shown], prompts)

    results["uncompressed"] = {
        **answers(uncompressed),
        "bytes_per_image": image_tokens(bare_processor) * width * 2,
    }
    if not is_fwd2bot:
        return results

    inputs = (processor.process_images(images[part]).to(model.device) for part in slices(pictures, batch_size))
    summary = Fwd2BotSummary.cat([model.compress(**batch) for batch in tqdm(inputs, desc="compress", leave=False)])
    searched = range(results["retrieval_pictures"])
    captions = _captions([scenes[index] for index in searched])
    tokens = _text_tokens(model, processor, captions, batch_size)
    for k in model.config.summary_lengths if lengths is None else lengths:
        short = summary.truncate(k)

        def compressed(
            shown: list[tuple[int, ...]], prompts: list[str], short: Fwd2BotSummary = short
        ) -> torch.Tensor:
            return answer_from_summary(model, processor, short[[i for row in shown for i in row]], prompts)

        results[f"k={k}"] = {
            **answers(compressed),
            "bytes_per_image": k * width * 2,
            **_retrieval(model, summary[searched], captions, tokens, k),
        }
    return results


def format_results(results: dict[str, Any]) -> str:
    """The results as a plain table, percentages, a column per setting."""
    settings = [name for name in results if name == "uncompressed" or name.startswith("k=")]
    flat = {name: flatten(results[name]) for name in settings}
    rows = list(dict.fromkeys(row for values in flat.values() for row in values))
    size = f"{results['pictures']} pictures, {results['questions']} questions"
    size += f", {results['several_questions']} on several pictures"
    lines = [f"{results['checkpoint']}: {size} ({results['split']})"]
    lines.append(" " * 44 + "".join(f"{name:>14}" for name in settings))
    for row in rows:
        cells = []
        for name in settings:
            value = flat[name].get(row)
            shown = "" if value is None else str(value) if isinstance(value, int) else f"{100 * value:.1f}"
            cells.append(f"{shown:>14}")
        lines.append(f"{row:<44}" + "".join(cells))
    return "\n".join(lines)


def _check(
    config: Any,
    pictures: int,
    questions: int,
    retrieval: int | None,
    several: int,
    lengths: Sequence[int] | None,
    batch_size: int,
) -> None:
    for name, value in (("pictures", pictures), ("questions", questions), ("batch size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if several < 0:
        raise ValueError(f"several must be at least 0, got {several}.")
    if retrieval is not None and not 1 <= retrieval <= pictures:
        raise ValueError(f"retrieval must be in 1..{pictures} (pictures), got {retrieval}.")
    if lengths is not None and config.model_type == "fwd2bot":
        check_lengths(config, lengths)


def _check_writable(output: Path) -> None:
    """Raise `OSError` unless the file can be written; leaves none behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    existed = output.exists()
    output.open("a").close()
    if not existed:
        output.unlink()


def _ask_several(scenes: Sequence[Scene], count: int) -> list[Asked]:
    """`count` questions, each about pictures of its own choice; fewer where a draw finds none."""
    numbers = [number for number in SEVERAL if number <= len(scenes)]
    asked: list[Asked] = []
    for prompt in range(count if numbers else 0):
        rng = random.Random(f"evaluate/several/{scenes[0].split}/{prompt}")
        number = numbers[prompt % len(numbers)]
        shown = companions(scenes.__getitem__, len(scenes), prompt % len(scenes), number, rng)
        asked += [(tuple(shown), question) for question in ask_several([scenes[i] for i in shown], rng, 1)]
    return asked


def _captions(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The texts of the retrieval figures, drawn anew from each scene alone."""
    short = [short_caption(one, scene_rng("short", one)) for one in scenes]
    pairs: dict[str, list[tuple[int, str, str]]] = {sort: [] for sort in HARD_NEGATIVE_SORTS}
    for index, one in enumerate(scenes):
        for sort, (caption, negative) in hard_negatives(one, scene_rng("negative", one)).items():
            pairs[sort].append((index, caption.text, negative))
    return {
        "full": [describe(one, scene_rng("full", one)) for one in scenes],
        "short": [caption.text for caption in short],
        "short_is_true": torch.from_numpy(truth_table(short, scenes)),  # (N, M)
        "pairs": {sort: values for sort, values in pairs.items() if values},
    }


def _text_tokens(model: Any, processor: Any, captions: dict[str, Any], batch_size: int) -> dict[str, torch.Tensor]:
    """Summary tokens `(M, k_max, d)` of every text that is needed, by its own words."""
    texts = [*captions["full"], *captions["short"]]
    texts += [text for values in captions["pairs"].values() for _, *both in values for text in both]
    unique = sorted(set(texts), key=len)
    tokens = torch.cat(
        [
            model.compress(**processor.process_texts(unique[part]).to(model.device)).tokens
            for part in tqdm(list(slices(len(unique), batch_size)), desc="texts", leave=False)
        ]
    )
    return dict(zip(unique, tokens, strict=True))


def _retrieval(model: Any, summary: Any, captions: dict[str, Any], tokens: dict[str, torch.Tensor], k: int) -> dict:
    """Recall both ways with full and with short captions, and preference over each sort of hard negative."""

    def embed(texts: Sequence[str]) -> torch.Tensor:
        return model.embed(summary=torch.stack([tokens[text] for text in texts]), num_summary_tokens=k)

    images = model.embed(summary=summary, num_summary_tokens=k)  # (N, e)
    full, short = images @ embed(captions["full"]).T, images @ embed(captions["short"]).T  # (N, N)
    own, true = torch.eye(len(images), dtype=torch.bool), captions["short_is_true"]
    ks = [k for k in (1, 5, 10) if k <= len(images)]
    sorts = {
        sort: preference(
            images[[index for index, _, _ in pairs]],
            embed([caption for _, caption, _ in pairs]),
            embed([negative for _, _, negative in pairs]),
        )
        for sort, pairs in captions["pairs"].items()
    }
    return {
        "full_caption_to_image": recall_at_k(full.T.cpu(), own, ks),
        "image_to_full_caption": recall_at_k(full.cpu(), own, ks),
        "short_caption_to_image": recall_at_k(short.T.cpu(), true.T, ks),
        "image_to_short_caption": recall_at_k(short.cpu(), true, ks),
        "hard_negatives": {**sorts, "mean": sum(sorts.values()) / len(sorts)},
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="folder or Hub id of a Fwd2Bot, or of a plain image-text-to-text model")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=5, help="per picture")
    parser.add_argument(
        "--retrieval", type=int, help="search among the first so many pictures (default: 1000, or all if fewer)"
    )
    parser.add_argument("--several", type=int, default=2000, help="questions about 2 to 5 pictures (default: 2000)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: the checkpoint's summary_lengths"
    )
    parser.add_argument("--batch-size", type=int, help="default: 250 scenes, or 16 rows of data")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--shapes-only", action="store_true", help="scenes that need no emoji font")
    data = parser.add_argument_group("on data sets")
    data.add_argument(
        "--data",
        metavar="FILE",
        help="a recipe or a run's recipe.json (its validation.sources), or a YAML file with sources",
    )
    data.add_argument("--rows", type=int, help="of each source, the first (default: all)")
    data.add_argument("--max-new-tokens", type=int, default=64, help="of an answer or a caption")
    data.add_argument("--no-uncompressed", action="store_true", help="leave the backbone on all image tokens out")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    args = parser.parse_args(arguments)
    try:
        check_name(args.checkpoint)
    except FileNotFoundError as error:
        parser.error(str(error))
    config = AutoConfig.from_pretrained(args.checkpoint)
    batch_size = 250 if args.batch_size is None else args.batch_size
    try:
        _check(config, args.pictures, args.questions, args.retrieval, args.several, args.lengths, batch_size)
    except ValueError as error:
        parser.error(str(error))
    for name, value in (("--rows", args.rows), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, got {value}.")
    if args.data is not None and config.model_type != "fwd2bot":
        parser.error(f"--data judges a Fwd2Bot, and {args.checkpoint} is a {config.model_type}; wrap it and train")
    if args.output is not None:
        try:
            _check_writable(args.output)
        except OSError as error:
            parser.error(f"--output {args.output} cannot be written ({error.strerror}); name a file in another folder")
    return args


if __name__ == "__main__":
    main()
