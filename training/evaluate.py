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
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fwd2bot import Fwd2BotSummary
from fwd2bot.folder_fwd2bot import check_name

from .answer_figures import yes_no_figures
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
from .cost import costs
from .presence import SORTS, presence_questions
from .provenance import SEED, provenance
from .recipe import DTYPES, load_sources
from .scene_retrieval import draw_captions, retrieval_figures, text_tokens
from .scenes import (
    Question,
    Scene,
    ask,
    ask_several,
    companions,
    render,
    scene,
)
from .source_evaluation import check_lengths, evaluate_sources, format_source_results, settings_of, shown, with_cost
from .sources import UnusableRowsError, open_sources

SEVERAL = (2, 3, 4, 5)  # pictures of a prompt that shows several


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    torch.manual_seed(SEED)
    try:
        results = _evaluate_scenes(args) if args.data is None else _evaluate_data(args)
    except (ValueError, OSError, UnusableRowsError) as error:
        sys.exit(f"error: {error}")
    print(format_results(results) if args.data is None else format_source_results(results))
    results["command"] = command_of("evaluate", sys.argv[1:] if arguments is None else arguments)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


def _evaluate_data(args: argparse.Namespace) -> dict[str, Any]:
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


def _evaluate_scenes(args: argparse.Namespace) -> dict[str, Any]:
    return evaluate(
        args.checkpoint,
        split=args.split,
        pictures=args.pictures,
        questions=args.questions,
        retrieval=args.retrieval,
        several=args.several,
        presence=args.presence,
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
    presence: int = 200,
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
        presence: number of pictures (the first) with questions on what they show, see `presence_questions`; 0: none.
        lengths: lengths k. Default: the checkpoint's `summary_lengths`.

    Raises:
        ValueError: a number is out of its range; before any compute.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    _check(config, pictures, questions, retrieval, several, presence, lengths, batch_size)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
    processor = AutoProcessor.from_pretrained(checkpoint)
    figures = evaluate_model(
        model,
        processor,
        split=split,
        pictures=pictures,
        questions=questions,
        retrieval=min(1000, pictures) if retrieval is None else retrieval,
        several=several,
        presence=presence,
        lengths=lengths,
        batch_size=batch_size,
        shapes_only=shapes_only,
    )
    return provenance(checkpoint, model) | figures


@torch.no_grad()
def evaluate_model(
    model: Any,
    processor: Any,
    *,
    split: str,
    pictures: int,
    questions: int,
    retrieval: int,
    several: int,
    presence: int,
    lengths: Sequence[int] | None = None,
    batch_size: int = 250,
    shapes_only: bool = False,
    uncompressed: bool = True,
) -> dict[str, Any]:
    """The figures of `evaluate`, of a model that is there already, in evaluation mode.

    Args:
        retrieval: number of pictures among which is searched; 0: none.
        uncompressed: whether the backbone on all image tokens is asked as well.
    """
    is_fwd2bot = model.config.model_type == "fwd2bot"
    scenes = [scene(split, index, shapes_only=shapes_only) for index in range(pictures)]
    images = [render(one) for one in tqdm(scenes, desc="draw", leave=False)]
    asked = [
        ((i,), question) for i, one in enumerate(scenes) for question in ask(one, scene_rng("ask", one), questions)
    ]
    asked_of_several = _ask_several(scenes, several)
    asked_of_presence = _ask_presence(scenes[:presence])
    results: dict[str, Any] = {
        "split": split,
        "pictures": pictures,
        "questions": len(asked),
        "several_questions": len(asked_of_several),
        "presence_pictures": min(presence, pictures),
        "retrieval_pictures": retrieval,
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
        if asked_of_presence:
            given = answer(asked_of_presence, bare_processor, batch_size, generate)
            figures["presence"] = _presence_by_sort(asked_of_presence, given)
        return figures

    def from_all_tokens(shown: list[tuple[int, ...]], prompts: list[str]) -> torch.Tensor:
        return answer_uncompressed(model, bare_processor, [[images[i] for i in row] for row in shown], prompts)

    if uncompressed:
        results["uncompressed"] = {
            **answers(from_all_tokens),
            "bytes_per_image": image_tokens(bare_processor) * width * 2,
        }
    lengths = list(dict.fromkeys(model.config.summary_lengths if lengths is None else lengths)) if is_fwd2bot else []
    asking = [{"type": "image"}, {"type": "text", "text": asked[0][1].text}]
    prompt = bare_processor.apply_chat_template([{"role": "user", "content": asking}], add_generation_prompt=True)
    results["cost"] = costs(model, processor, images[0], prompt, lengths, uncompressed)
    if not is_fwd2bot:
        return results

    inputs = (processor.process_images(images[part]).to(model.device) for part in slices(pictures, batch_size))
    summary = Fwd2BotSummary.cat([model.compress(**batch) for batch in tqdm(inputs, desc="compress", leave=False)])
    searched = range(retrieval)
    captions = draw_captions([scenes[index] for index in searched]) if retrieval else {}
    tokens = text_tokens(model, processor, captions, batch_size) if retrieval else {}
    for k in lengths:
        short = summary.truncate(k)

        def compressed(
            shown: list[tuple[int, ...]], prompts: list[str], short: Fwd2BotSummary = short
        ) -> torch.Tensor:
            return answer_from_summary(model, processor, short[[i for row in shown for i in row]], prompts)

        results[f"k={k}"] = {
            **answers(compressed),
            "bytes_per_image": k * summary.tokens.shape[-1] * 2,
            **(retrieval_figures(model, summary[searched], captions, tokens, k) if retrieval else {}),
        }
    return results


def format_results(results: dict[str, Any]) -> str:
    """The results as a plain table, percentages, a column per setting."""
    settings = settings_of(results)
    flat = with_cost(results)
    rows = list(dict.fromkeys(row for values in flat.values() for row in values))
    size = f"{results['pictures']} pictures, {results['questions']} questions"
    size += f", {results['several_questions']} on several pictures"
    lines = [f"{results['checkpoint']}: {size} ({results['split']})"]
    lines.append(" " * 44 + "".join(f"{name:>14}" for name in settings))
    for row in rows:
        lines.append(f"{row:<44}" + "".join(f"{shown(row, flat[name].get(row)):>14}" for name in settings))
    return "\n".join(lines)


def _check(
    config: Any,
    pictures: int,
    questions: int,
    retrieval: int | None,
    several: int,
    presence: int,
    lengths: Sequence[int] | None,
    batch_size: int,
) -> None:
    for name, value in (("pictures", pictures), ("questions", questions), ("batch size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value in (("several", several), ("presence", presence)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    if retrieval is not None and not 1 <= retrieval <= pictures:
        raise ValueError(f"retrieval must be in 1..{pictures} (pictures), got {retrieval}.")
    if lengths is not None and config.model_type == "fwd2bot":
        check_lengths(config, lengths)


def _first(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


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


def _ask_presence(scenes: Sequence[Scene]) -> list[Asked]:
    """Questions on what each picture shows and does not, the sort of the negatives as their kind."""
    asked = presence_questions([list(one.counts) for one in scenes])
    return [((q.picture,), Question(q.sort, q.text("Is there {thing} in the picture?"), q.answer)) for q in asked]


def _presence_by_sort(asked: list[Asked], given: list[str]) -> dict[str, dict[str, float]]:
    figures = {}
    for sort in SORTS:
        rows = [row for row, (_, question) in enumerate(asked) if question.kind == sort]
        if rows:
            figures[sort] = yes_no_figures([given[row] for row in rows], [asked[row][1].answer for row in rows])
    return figures


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
        "--presence", type=int, default=200, help="pictures with questions on what they show (default: 200)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: the checkpoint's summary_lengths"
    )
    parser.add_argument("--batch-size", type=int, help="default: 250 scenes, or 16 rows of data")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
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
    try:
        config = AutoConfig.from_pretrained(args.checkpoint)
    except (ValueError, OSError) as error:  # transformers says it in several lines, about the Hub first
        what = "has no model that transformers knows" if Path(args.checkpoint).is_dir() else "is not there"
        parser.error(f"{args.checkpoint} {what}; give the folder of a trained model, or its Hub id ({_first(error)})")
    batch_size = 250 if args.batch_size is None else args.batch_size
    try:
        numbers = (args.pictures, args.questions, args.retrieval, args.several, args.presence)
        _check(config, *numbers, args.lengths, batch_size)
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
