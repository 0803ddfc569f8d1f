"""The figures of an evaluation on drawn scenes, as the model card shows them."""

from collections.abc import Iterable
from typing import Any

from huggingface_hub import EvalResult

from .tables import table


def drawn_figures(results: dict[str, Any]) -> dict[str, Any]:
    """What the card's template needs, from the output of `fwd2bot.training.evaluate`.

    Raises:
        ValueError: a figure of the card is not among the results; the message names it.
    """
    lengths = _lengths(results)
    settings = ["uncompressed", *lengths]

    def values(names: Iterable[str], *path: str) -> list[Any]:
        return [_entry(results, name, *path) for name in names]

    kinds = [kind for kind in _entry(results, "uncompressed", "answers") if kind != "all"]
    answers = [[kind, *map(_percent, values(settings, "answers", kind))] for kind in kinds]
    of_all = values(settings, "answers", "all")
    answers.append(["**all**", *map(_percent, of_all)])
    if of_all[0] > 0:
        answers.append(["share of uncompressed", *(_percent(share / of_all[0]) for share in of_all)])

    several: dict[str, str] = {"kinds": "", "several_questions": ""}
    if results.get("several_questions"):  # an evaluation may leave them out
        shares = [
            [kind if kind != "all" else "**all**", *map(_percent, values(settings, "several", kind))]
            for kind in sorted(_entry(results, "uncompressed", "several"), key=lambda kind: (kind == "all", kind))
        ]
        shares += [
            [f"{number} pictures", *map(_percent, values(settings, "several_by_pictures", number))]
            for number in _entry(results, "uncompressed", "several_by_pictures")
        ]
        several = {
            "kinds": table(["", *settings], shares),
            "several_questions": f"{results['several_questions']:,}",
        }

    rows = []
    for group in (
        "full_caption_to_image",
        "image_to_full_caption",
        "short_caption_to_image",
        "image_to_short_caption",
    ):
        for measure in _entry(results, lengths[0], group):
            rows.append([f"{group.replace('_', ' ')}, {measure}", *map(_percent, values(lengths, group, measure))])
    for sort in _entry(results, lengths[0], "hard_negatives"):
        shares = map(_percent, values(lengths, "hard_negatives", sort))
        rows.append([f"hard negatives, {sort.replace('_', ' ')}", *shares])

    checkpoint = _entry(results, "checkpoint")
    return {
        "command": results.get(
            "command", f"python -m fwd2bot.training.evaluate hub/{checkpoint} --output evaluation.json"
        ),
        "answers": table(["kind", *settings], answers),
        **several,
        "retrieval": table(["", *lengths], rows),
        "sizes": table(settings, [[f"{size:,}" for size in values(settings, "bytes_per_image")]]),
        "torch": _entry(results, "versions", "torch"),
        "transformers": _entry(results, "versions", "transformers"),
        **{key: f"{_entry(results, key):,}" for key in ("pictures", "questions", "retrieval_pictures")},
        **{key: _entry(results, key) for key in ("split", "dtype", "fingerprint")},
    }


def drawn_eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The `model-index`: answers in every setting, short captions at every length."""
    lengths = _lengths(results)

    def one(task: str, metric: str, words: str, setting: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=task,
            dataset_type="fwd2bot-drawn-scenes",
            dataset_name="drawn scenes of the fwd2bot package",
            dataset_split=_entry(results, "split"),
            metric_type=metric,
            metric_name=f"{words}, {setting}",
            metric_value=round(100 * value, 2),
        )

    answers = [
        one(
            "visual-question-answering",
            "exact_match",
            "Exact match",
            setting,
            _entry(results, setting, "answers", "all"),
        )
        for setting in ("uncompressed", *lengths)
        for share in [_entry(results, setting, "answers", "all")]
    ]
    found = [
        one(
            "image-text-retrieval",
            "recall",
            "Short caption to image, recall@1",
            setting,
            _entry(results, setting, "short_caption_to_image", "recall@1"),
        )
        for setting in lengths
    ]
    return answers + found


def _lengths(results: dict[str, Any]) -> list[str]:
    lengths = [name for name in results if name.startswith("k=")]
    if not lengths:
        raise _missing("k=...")
    return lengths


def _entry(results: dict[str, Any], *path: str) -> Any:
    entry: Any = results
    for name in path:
        if not isinstance(entry, dict) or name not in entry:
            raise _missing(*path)
        entry = entry[name]
    return entry


def _missing(*path: str) -> ValueError:
    return ValueError(
        f"the evaluation has no entry {' / '.join(path)}: it is of an older version, or of a model that does not "
        "compress. Evaluate this checkpoint anew with fwd2bot.training.evaluate."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
